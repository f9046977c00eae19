"""Integers chosen by what layers are fed on calibration text, and bits where they matter."""
