"""Merges whose weights are found from a loss on a few examples. Each file but registry is one."""
