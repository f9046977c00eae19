"""Merges: functions from several updates to one, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calibrate.low_rank import LowRankUpdate
from caliport_core.errors import InputError


def linear(
    updates: Sequence[LowRankUpdate], weights: Sequence[float] | None = None
) -> LowRankUpdate:
    """Average A and B separately: A' = Σ wᵢAᵢ, B' = Σ wᵢBᵢ, ΔW' = B'·A'.

    Eq. 5 of Learnable Calibration (arXiv 2507.16083), where wᵢ = 1/N. This is not the weighted
    sum of the ΔWᵢ: it has cross terms Bᵢ·Aⱼ. The adapter's scaling is inside B, so adapters of
    one α/r give exactly the paper's merge.

    Args:
        updates: Adapters of equal rank in every module.
        weights: One a update; default 1/N each.

    Raises:
        InputError: The updates target different modules or have different ranks or shapes.
    """
    weights = _weights(updates, weights)
    first = updates[0]
    _check_same(updates, rank=True)
    pairs = list(zip(weights, updates, strict=True))
    return LowRankUpdate(
        {n: _sum([w * u.a[n] for w, u in pairs]) for n in first.modules},
        {n: _sum([w * u.b[n] for w, u in pairs]) for n in first.modules},
    )


def exact(
    updates: Sequence[LowRankUpdate], weights: Sequence[float] | None = None
) -> LowRankUpdate:
    """The weighted sum itself, by concatenation: ΔW = Σ wᵢ·Bᵢ·Aᵢ, of rank Σ rᵢ.

    A module that only some updates target keeps what those give it.

    Args:
        updates: Adapters of any ranks and modules.
        weights: One a update; default 1/N each (0.5 for two, as in the paper's "concat").

    Raises:
        InputError: A module has different shapes in two updates.
    """
    weights = _weights(updates, weights)
    _check_same(updates, rank=False)
    names = sorted({name for update in updates for name in update.modules})
    pairs = list(zip(weights, updates, strict=True))
    return LowRankUpdate(
        {n: torch.cat([u.a[n] for _, u in pairs if n in u.a], dim=0) for n in names},
        {n: torch.cat([w * u.b[n] for w, u in pairs if n in u.b], dim=1) for n in names},
    )


MERGES = {"linear": linear, "exact": exact}


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum(dim=0)


def _weights(updates: Sequence[LowRankUpdate], weights: Sequence[float] | None) -> Sequence[float]:
    if not updates:
        raise InputError("a merge needs at least one adapter, found none")
    if weights is None:
        return [1.0 / len(updates)] * len(updates)
    if len(weights) != len(updates):
        raise InputError(f"{len(weights)} weights for {len(updates)} adapters; expected one each")
    return weights


def _check_same(updates: Sequence[LowRankUpdate], *, rank: bool) -> None:
    """Equal shapes of shared modules; with ``rank`` also equal modules and ranks."""
    first = updates[0]
    for index, other in enumerate(updates[1:], start=2):
        if rank and other.modules != first.modules:
            odd = sorted(set(first.modules) ^ set(other.modules))[0]
            raise InputError(
                f"linear merge: {odd} is in only one of adapters 1 and {index}; "
                "expected the same target modules (the exact merge takes any)"
            )
        for name in set(first.modules) & set(other.modules):
            if first.shape(name) != other.shape(name):
                raise InputError(
                    f"{name}: adapter 1 has shape {first.shape(name)}, adapter {index} "
                    f"{other.shape(name)}; expected adapters of one base"
                )
            if rank and first.rank(name) != other.rank(name):
                raise InputError(
                    f"linear merge: {name} has rank {first.rank(name)} in adapter 1 and "
                    f"{other.rank(name)} in adapter {index}; expected equal ranks "
                    "(the exact merge takes any)"
                )
