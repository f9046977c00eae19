"""Operations on the dense ΔW of one module, for TIES and DARE: trim, drop, elect, factorise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from caliport.core.errors import InputError


def trim(delta: Tensor, density: float) -> Tensor:
    """Keep the ⌊density·n⌋ values of largest magnitude (at least one); set the others to 0.

    Args:
        delta: ΔW [out, in], n values.
        density: In (0, 1].
    """
    keep = max(1, int(density * delta.numel()))
    flat = delta.flatten()
    kept = torch.topk(flat.abs(), keep, sorted=False).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(delta)


def drop(delta: Tensor, density: float, draw: torch.Generator) -> Tensor:
    """Keep each value with probability ``density``, divided by it; set the others to 0.

    Eq. 1 of DARE (arXiv 2311.03099) with p = 1 − density: the expected value is ΔW.
    """
    kept = torch.rand(delta.shape, generator=draw) < density
    return torch.where(kept, delta / density, 0.0)


def disjoint(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Elect a sign for every position, then average the values that agree with it.

    Section 3.2 of TIES (arXiv 2306.01708) with weights: γ = sgn(Σ wᵢΔWᵢ), positive where the sum
    is 0, and over the i whose wᵢΔWᵢ has sign γ

        ΔW = λ · Σ wᵢΔWᵢ / Σ |wᵢ|,  λ = Σ |wᵢ| over all i.

    With equal weights this is the paper's mean over those that agree, times λ. Where all agree, it
    is Σ wᵢΔWᵢ, the exact sum. Weights 1/N give λ = 1, weights 1 the paper's λ = N.

    Args:
        deltas: [out, in] each.
        weights: One per ΔW.
    """
    pairs = [(w, d) for w, d in zip(weights, deltas, strict=True) if w != 0]
    total = torch.zeros_like(deltas[0], dtype=torch.float64)
    for weight, delta in pairs:
        total.add_(delta, alpha=weight)
    elected = total >= 0
    kept, share = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for weight, delta in pairs:
        agrees = ((delta > 0) == (elected == (weight > 0))) & (delta != 0)
        kept.addcmul_(delta, agrees, value=weight)
        share.add_(agrees, alpha=abs(weight))
    scale = sum(abs(weight) for weight in weights)
    return torch.where(share > 0, kept.mul_(scale).div_(share), 0.0)


def factor(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation B·A of a dense ΔW of at most ``rank`` (Eckart–Young).

    The singular vectors of the shorter side come from its Gram matrix in float64. Only the largest
    ``rank`` are computed, which keeps it affordable for wide layers.

    Args:
        delta: ΔW [out, in].
        rank: R; min(out, in) at most is used.

    Returns:
        A [R, in] and B [out, R], float32, each with the square roots of the singular values.

    Raises:
        InputError: Values that are not finite.
    """
    from scipy.linalg import eigh

    if not delta.isfinite().all():
        raise InputError("a merged ΔW is not finite in float32; expected smaller weights")
    tall = delta.shape[0] > delta.shape[1]
    wide = (delta.T if tall else delta).double()
    n = wide.shape[0]
    rank = min(rank, n)
    _, vectors = eigh((wide @ wide.T).numpy(), subset_by_index=[n - rank, n - 1])
    left = torch.from_numpy(vectors).flip(1)
    right = left.T @ wide
    root = right.norm(dim=1).sqrt()
    right = torch.where(root[:, None] > 0, right / root[:, None], 0.0)
    left = left * root
    a, b = (left.T, right.T) if tall else (right, left)
    return a.float().contiguous(), b.float().contiguous()
