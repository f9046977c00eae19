"""Eager models that compute what an artifact should: folded, or beside a base."""
