"""Merges: from several updates to one, without training. Each file but the helpers is one merge."""
