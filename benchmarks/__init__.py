"""Benchmarks that take minutes to hours; each is one command."""
