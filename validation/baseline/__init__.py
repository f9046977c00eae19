"""Stored baselines and gates against them."""
