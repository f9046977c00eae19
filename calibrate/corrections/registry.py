"""The corrections by name, found by file name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from caliport.core.entries import Entries

if TYPE_CHECKING:
    from caliport.calibrate.corrections.common import CorrectionType

CORRECTIONS: Entries[CorrectionType] = Entries(
    "caliport.calibrate.corrections", "CORRECTION", helpers=("common", "registry", "train")
)
"""Corrections that are trained on examples of the composition."""
