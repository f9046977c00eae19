"""TSV merge: singular vectors of the adapters, made orthogonal to one another, then summed."""

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
    targeting,
)
from caliport.calibrate.merges.core_space import Core


def tsv(updates: Sequence[LowRankUpdate], weights: Sequence[float] | None = None) -> LowRankUpdate:
    """TSV-Merge: whiten the singular vectors of all ΔWᵢ, then sum (arXiv 2412.00081).

    With ΔWᵢ = Uᵢ·Σᵢ·Vᵢᵀ, U = [U₁ U₂ …], V = [V₁ V₂ …] and Σ = diag(w₁Σ₁, w₂Σ₂, …), the merge is
    ΔW = U⊥·Σ·V⊥ᵀ, where X⊥ = P·Qᵀ is the nearest matrix with orthonormal columns (or rows, if it is
    wider than high) to X = P·D·Qᵀ. So directions that adapters share do not add up. It is computed
    in Core Space (arXiv 2509.17786), where the result is the same as with dense ΔWᵢ: U and V lie in
    the spaces that the adapters span. The paper sums with weights 1.

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
        kept = _kept(core, [part.rank(name) for part in parts])
        found = []
        for matrix, keep in zip(core.parts, kept, strict=True):
            u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
            found.append((u[:, :keep], s[:keep], vt[:keep]))
        values = torch.cat([w * s for w, (_, s, _) in zip(shares, found, strict=True)])
        left = _orthogonal(torch.cat([u for u, _, _ in found], dim=1))
        right = _orthogonal(torch.cat([vt for _, _, vt in found]))
        return core.factors((left * values) @ right)

    return merge_by_module(updates, merged)


MERGE = Merge(
    name="tsv",
    label="TSV in Core Space",
    source="arXiv 2412.00081; Core Space, arXiv 2509.17786",
    limits="",
    difference="directions that adapters share are turned apart, so that they do not add up",
    function=tsv,
)


def _kept(core: Core, ranks: Sequence[int]) -> list[int]:
    """How many singular values of each adapter are kept: all, or their share of what there is.

    The paper keeps min(out, in)/N of each, which is more than any rᵢ unless the layer is small.
    """
    room, total = min(core.columns.shape[0], core.rows.shape[1]), sum(ranks)
    return [rank if total <= room else max(1, room * rank // total) for rank in ranks]


def _orthogonal(matrix: Tensor) -> Tensor:
    """P·Qᵀ of X = P·D·Qᵀ: the nearest matrix with orthonormal columns or rows."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right
