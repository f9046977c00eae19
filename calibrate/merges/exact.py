"""Exact merge: the weighted sum of the updates, by concatenation."""

from __future__ import annotations

from collections.abc import Sequence

from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.merges.common import (
    Merge,
    check_shapes,
    concatenated,
    merge_by_module,
    resolve_weights,
    targeting,
)


def exact(
    updates: Sequence[LowRankUpdate], weights: Sequence[float] | None = None
) -> LowRankUpdate:
    """The weighted sum, by concatenation: ΔW = Σ wᵢ·Bᵢ·Aᵢ, of rank Σ rᵢ.

    In a module that only some updates target, the sum is over those.

    Args:
        updates: Adapters of any ranks and modules.
        weights: One per update; default 1/N each (0.5 for two, as in the paper's "concat").

    Raises:
        InputError: A module has different shapes in two updates.
    """
    weights = resolve_weights(updates, weights)
    check_shapes(updates)
    return merge_by_module(
        updates, lambda name: concatenated(*targeting(name, updates, weights), name)
    )


MERGE = Merge(
    name="exact",
    label="exact merge",
    source='the weighted sum; "concat" in Learnable Calibration, arXiv 2507.16083',
    limits="",
    difference="",
    function=exact,
)
