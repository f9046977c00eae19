"""The stages: each makes one directory, unless it is up to date."""
