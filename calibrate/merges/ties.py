"""TIES merge: trim, elect signs, average those that agree."""

from __future__ import annotations

from collections.abc import Sequence

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
    targeting,
)
from caliport.calibrate.merges.sparsify import disjoint, factor, trim


def ties(
    updates: Sequence[LowRankUpdate],
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    rank: int | None = None,
) -> LowRankUpdate:
    """TIES: trim each ΔWᵢ, elect signs, average those that agree (arXiv 2306.01708, Section 3.2).

    Acts on the dense ΔWᵢ = Bᵢ·Aᵢ, because signs of A and B have no meaning (−B·−A is the same
    update). Trims module by module, as PEFT does; the paper trims the whole model at once. The
    scale is the paper's mean over those that agree, times λ = Σ |wᵢ|, so weights 1/N give λ = 1;
    ``caliport.calibrate.merges.sparsify.disjoint`` has the formula. If all values are kept and
    agree, this is the exact sum. (PEFT elects by the unweighted sum and divides by the number that
    agree, which with weights 1/N scales by 1/N twice.)

    Args:
        updates: Adapters of any ranks and modules.
        weights: One per update; default 1/N each.
        density: Share of values to keep, in (0, 1].
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
    check_dense("ties", updates)

    def merged(name: str) -> tuple[Tensor, Tensor]:
        parts, shares = targeting(name, updates, weights)
        dense = disjoint([trim(part.delta(name), density) for part in parts], shares)
        return factor(dense, rank or sum(part.rank(name) for part in parts))

    return merge_by_module(updates, merged)


MERGE = Merge(
    name="ties",
    label="TIES",
    source="arXiv 2306.01708, Section 3.2",
    limits="density in (0, 1]",
    difference="small values and those of the minority sign are dropped, and the others averaged "
    "over the adapters that agree",
    function=ties,
)
