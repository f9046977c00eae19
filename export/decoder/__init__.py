"""Prepare a decoder for lowering: checks, skeleton, weights in files."""
