"""Recipes: their fields, how they are read, and the names of methods."""
