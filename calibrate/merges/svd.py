"""SVD-truncated merge: the weighted sum, cut to one adapter's rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.merges.common import (
    Merge,
    check_rank,
    check_shapes,
    concatenated,
    merge_by_module,
    resolve_weights,
    targeting,
)


def svd(
    updates: Sequence[LowRankUpdate],
    weights: Sequence[float] | None = None,
    rank: int | None = None,
) -> LowRankUpdate:
    """The best approximation of the exact sum at a given rank, in every module.

    It keeps the largest singular values of Σ wᵢ·Bᵢ·Aᵢ (Eckart–Young); the squared error is the sum
    of the squares of the others. Computed from the concatenated factors, B = Q₁R₁ and Aᵀ = Q₂R₂,
    and the SVD of the small R₁·R₂ᵀ; ΔW is never built.

    Args:
        updates: Adapters of any ranks and modules.
        weights: One per update; default 1/N each.
        rank: R of every module; default the largest single adapter's rank there, so that the
            merge is as large as one adapter. Σ rᵢ or more keeps the sum exactly.

    Raises:
        InputError: A module has different shapes in two updates, or rank is below 1.
    """
    weights = resolve_weights(updates, weights)
    check_shapes(updates)
    check_rank(rank)

    def truncated(name: str) -> tuple[Tensor, Tensor]:
        parts, shares = targeting(name, updates, weights)
        a, b = (t.double() for t in concatenated(parts, shares, name))
        q1, r1 = torch.linalg.qr(b)
        q2, r2 = torch.linalg.qr(a.T)
        u, s, vt = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
        keep = min(rank or max(part.rank(name) for part in parts), len(s))
        root = s[:keep].sqrt()
        return (root[:, None] * (vt[:keep] @ q2.T)).float(), ((q1 @ u[:, :keep]) * root).float()

    return merge_by_module(updates, truncated)


MERGE = Merge(
    name="svd",
    label="SVD-truncated merge",
    source="Eckart and Young 1936",
    limits="",
    difference="singular values of the sum beyond the rank of one adapter are cut off",
    function=svd,
)
