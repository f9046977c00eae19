"""What every stage stands on: errors, whole-or-not-at-all directories, checkpoints, progress."""
