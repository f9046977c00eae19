"""Recipes: their fields, reading and checking them, and the names of methods."""
