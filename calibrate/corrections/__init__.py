"""Corrections: a few values trained on top of frozen adapters. Each file but the helpers is one."""
