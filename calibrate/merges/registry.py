"""The merges by name, found by file name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from caliport.core.entries import Entries

if TYPE_CHECKING:
    from caliport.calibrate.merges.common import Merge

MERGES: Entries[Merge] = Entries(
    "caliport.calibrate.merges",
    "MERGE",
    helpers=("common", "core_space", "registry", "sparsify", "weights"),
)
"""Merges that need no data."""
