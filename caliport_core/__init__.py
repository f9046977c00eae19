"""Shared by every stage: errors, atomically written directories, checkpoints, progress."""
