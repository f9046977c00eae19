"""Artifacts with one seeded fault each, and what the gates say of them."""
