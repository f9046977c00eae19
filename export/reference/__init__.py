"""Eager reference models for artifacts: folded, or with low-rank terms beside a base."""
