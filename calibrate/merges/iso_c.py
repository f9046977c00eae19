"""Iso-C merge: the sum of the adapters with all its singular values made equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.merges.common import (
    Merge,
    check_shapes,
    merge_by_module,
    resolve_weights,
    summed,
    targeting,
)
from caliport.calibrate.merges.core_space import Core, nonzero


def iso_c(
    updates: Sequence[LowRankUpdate], weights: Sequence[float] | None = None
) -> LowRankUpdate:
    """Iso-C: the weighted sum with an isotropic spectrum, in Core Space (arXiv 2502.04959).

    With Σ wᵢΔWᵢ = U·Σ·Vᵀ and σ̄ the mean of the singular values, ΔW = σ̄·U·Vᵀ, so that directions of
    weak adapters count as much as those of strong ones. In Core Space (arXiv 2509.17786) the mean
    is over the directions that the adapters span; a dense mean would be over min(out, in) values,
    nearly all of them 0, with directions that no adapter has. The paper sums with weights 1.

    Args:
        updates: Adapters of any ranks and modules.
        weights: One per update; default 1/N each.

    Raises:
        InputError: A module has different shapes in two updates.
    """
    weights = resolve_weights(updates, weights)
    check_shapes(updates)

    def merged(name: str) -> tuple[Tensor, Tensor]:
        parts, shares = targeting(name, updates, weights)
        core = Core.of(parts, name)
        total = summed([w * part for w, part in zip(shares, core.parts, strict=True)])
        u, s, vt = torch.linalg.svd(total, full_matrices=False)
        strong = nonzero(s, max(total.shape))
        level = s[strong].mean() if strong.any() else s.new_zeros(())
        return core.factors(level * u[:, strong] @ vt[strong])

    return merge_by_module(updates, merged)


MERGE = Merge(
    name="iso-c",
    label="Iso-C in Core Space",
    source="arXiv 2502.04959; Core Space, arXiv 2509.17786",
    limits="",
    difference="all singular values of the sum are replaced by their mean",
    function=iso_c,
)
