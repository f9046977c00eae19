"""A decoder on its way to a program: checks, skeleton, weights in files."""
