"""Quantizers, which find the integers of a weight: one file each."""
