"""The merges with weights found from a loss, by name, found by file name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from caliport.core.entries import Entries

if TYPE_CHECKING:
    from caliport.calibrate.merges.common import WeightSearch

WEIGHT_SEARCHES: Entries[WeightSearch] = Entries(
    "caliport.calibrate.merges.by_loss", "WEIGHT_SEARCH", helpers=("registry",)
)
"""Merges that need a few examples to choose one weight per adapter."""
