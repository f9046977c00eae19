"""SLERP merge: spherical interpolation between the updates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.merges.common import (
    Merge,
    check_shapes,
    concatenated,
    merge_by_module,
    resolve_weights,
    targeting,
)
from caliport.core.errors import InputError

# Above this |cosine|, sinΩ is too small to divide by, and arc and line differ by at most 0.03 %.
_PARALLEL = 0.9995


def slerp(
    updates: Sequence[LowRankUpdate], weights: Sequence[float] | None = None
) -> LowRankUpdate:
    """Spherical interpolation of the flattened ΔW, module by module (Shoemake, SIGGRAPH 1985).

    For two, with t = w₂/(w₁ + w₂) and Ω the angle between ΔW₁ and ΔW₂,

        ΔW = sin((1−t)Ω)/sinΩ · ΔW₁ + sin(tΩ)/sinΩ · ΔW₂.

    The ΔW are not scaled to norm 1 first, so updates of equal norm keep that norm and others get a
    norm in between. More than two are merged one after another, the third at
    t = w₃/(w₁ + w₂ + w₃) and so on, so their order matters a little. The result is a concatenation
    with other weights, of rank Σ rᵢ. Norms and angles come from the factors,
    ⟨ΔW₁, ΔW₂⟩ = Σ (B₁ᵀB₂ ∘ A₁A₂ᵀ). If Ω is undefined (a ΔW is 0 or missing) or sinΩ is nearly 0
    (|cosΩ| > 0.9995: parallel or opposite), interpolation is linear, with weights 1−t and t.

    Args:
        updates: Adapters of any ranks and modules.
        weights: One per update, none negative; only their ratios matter. Default equal.

    Raises:
        InputError: A module has different shapes in two updates, a weight is negative or all
            are 0.
    """
    weights = resolve_weights(updates, weights)
    if min(weights) < 0 or sum(weights) <= 0:
        raise InputError(
            f"slerp merge: weights are {list(weights)}, expected none negative and not all 0"
        )
    check_shapes(updates)

    def merged(name: str) -> tuple[Tensor, Tensor]:
        products = _inner_products(updates, name)
        shares = torch.zeros(len(updates), dtype=torch.float64)
        done = 0.0
        for index, weight in enumerate(weights):
            new = torch.zeros_like(shares)
            new[index] = 1.0
            done += weight
            t = weight / done if done > 0 else 0.0
            before, after = _arc(t, shares, new, products)
            shares = before * shares + after * new
        return concatenated(*targeting(name, updates, shares.tolist()), name)

    return merge_by_module(updates, merged)


MERGE = Merge(
    name="slerp",
    label="SLERP",
    source="Shoemake, SIGGRAPH 1985",
    limits="no negative weights; only their ratios matter",
    difference="it keeps the adapters' norm, and the average of unlike adapters is smaller",
    function=slerp,
)


def _arc(t: float, one: Tensor, two: Tensor, products: Tensor) -> tuple[float, float]:
    """Weights of two combinations of the ΔWᵢ at position t on the arc between them.

    Args:
        t: 0 is the first, 1 the second.
        one, two: Coefficients [N].
        products: ⟨ΔWᵢ, ΔWⱼ⟩ [N, N].
    """
    norms = math.sqrt(max(float((one @ products @ one) * (two @ products @ two)), 0.0))
    cosine = float(one @ products @ two) / norms if norms > 0 else 1.0
    if abs(cosine) > _PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _inner_products(updates: Sequence[LowRankUpdate], name: str) -> Tensor:
    """⟨ΔWᵢ, ΔWⱼ⟩ [N, N] of one module in float64, 0 where an update does not target it."""
    products = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    present = [index for index, update in enumerate(updates) if name in update.a]
    for i in present:
        for j in present:
            bb = updates[i].b[name].double().T @ updates[j].b[name].double()
            aa = updates[i].a[name].double() @ updates[j].a[name].double().T
            products[i, j] = (bb * aa).sum()
    return products
