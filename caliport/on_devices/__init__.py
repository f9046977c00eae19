"""Artifacts on devices: what ``--device`` and ``caliport device`` do."""
