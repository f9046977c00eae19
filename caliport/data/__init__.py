"""Data sets of Caliport: the embedded pocket grammar, Multi30k, and JSON Lines files."""
