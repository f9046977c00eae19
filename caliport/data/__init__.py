"""Data sets: the built-in pocket grammar, Multi30k, the paper's sets, and JSON Lines files."""
