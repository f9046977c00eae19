"""DARE merge: drop values at random, rescale the others, sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.merges.common import (
    Merge,
    check_dense,
    check_density,
    check_rank,
    check_shapes,
    merge_by_module,
    resolve_weights,
    summed,
    targeting,
)
from caliport.calibrate.merges.sparsify import drop, factor
from caliport.calibrate.merges.svd import svd


def dare(
    updates: Sequence[LowRankUpdate],
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    seed: int = 0,
    rank: int | None = None,
) -> LowRankUpdate:
    """DARE: drop values at random, rescale the others, sum (arXiv 2311.03099, Eq. 1).

    Each value of the dense ΔWᵢ is kept with probability ``density`` and divided by it, so that the
    expected merge is the exact sum Σ wᵢ·ΔWᵢ. Same seed, same result. With density 1 nothing is
    dropped: the result is that sum, from the factors, and no dense ΔW is made.

    Args:
        updates: Adapters of any ranks and modules.
        weights: One per update; default 1/N each.
        density: Share of values to keep, in (0, 1].
        seed: Decides which values are kept.
        rank: The result is not low-rank, so its largest R singular values are kept; default
            Σ rᵢ of the module, the cost of the exact sum. min(out, in) keeps all of it.

    Raises:
        InputError: A module has different shapes in two updates or is too large for a dense ΔW, or
            density or rank is out of range.
    """
    weights = resolve_weights(updates, weights)
    check_shapes(updates)
    check_rank(rank)
    check_density(density)
    if density == 1:
        whole = sum(max(map(u.rank, u.modules), default=0) for u in updates)
        return svd(updates, weights, rank or whole or None)
    check_dense("dare", updates)
    draw = torch.Generator().manual_seed(seed)

    def merged(name: str) -> tuple[Tensor, Tensor]:
        parts, shares = targeting(name, updates, weights)
        terms = [
            w * drop(part.delta(name), density, draw) for w, part in zip(shares, parts, strict=True)
        ]
        return factor(summed(terms), rank or sum(part.rank(name) for part in parts))

    return merge_by_module(updates, merged)


MERGE = Merge(
    name="dare",
    label="DARE",
    source="arXiv 2311.03099, Eq. 1",
    limits="density in (0, 1]",
    difference="values are dropped at random and the others scaled up",
    function=dare,
)
