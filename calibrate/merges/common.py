"""Merges: functions from several updates to one, before anything is trained.

All take updates of one base and weights, one an update; the updates are never changed. Weights
are 1/N by default, so merges are averages (0.5 each for two, as in the paper's baselines); weights
of 1 make sums. A module that only some updates target keeps what those give it, in every merge but
``linear``, which refuses it: an update that does not target a module counts as ΔW = 0 there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from caliport.calibrate.low_rank import LowRankUpdate
from caliport.core.errors import InputError


def none(updates: Sequence[LowRankUpdate]) -> LowRankUpdate:
    """The update of rank 0 of every module that any update targets: no adapter underneath.

    What a correction is trained on in the paper's ablation "without the merged LoRAs"
    (arXiv 2507.16083). A is [0, in] and B [out, 0].
    """
    _weights(updates, None)
    _check_same(updates)

    def empty(name: str) -> tuple[Tensor, Tensor]:
        part = next(u for u in updates if name in u.a)
        return part.a[name][:0], part.b[name][:, :0]

    return _of_modules(updates, empty)


def _of_modules(
    updates: Sequence[LowRankUpdate], merged: Callable[[str], tuple[Tensor, Tensor]]
) -> LowRankUpdate:
    """The update whose A and B of each module that any update targets are ``merged(name)``."""
    pairs = {name: merged(name) for name in sorted({n for u in updates for n in u.modules})}
    return LowRankUpdate(
        {n: a for n, (a, _) in pairs.items()}, {n: b for n, (_, b) in pairs.items()}
    )


def _targeting(
    name: str, updates: Sequence[LowRankUpdate], weights: Sequence[float]
) -> tuple[list[LowRankUpdate], list[float]]:
    """The updates that have the module, and their weights."""
    pairs = [(u, w) for u, w in zip(updates, weights, strict=True) if name in u.a]
    return [u for u, _ in pairs], [w for _, w in pairs]


def _concatenated(
    updates: Sequence[LowRankUpdate], weights: Sequence[float], name: str
) -> tuple[Tensor, Tensor]:
    pairs = list(zip(weights, updates, strict=True))
    return (
        torch.cat([u.a[name] for _, u in pairs], dim=0),
        torch.cat([w * u.b[name] for w, u in pairs], dim=1),
    )


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum(dim=0)


def _weights(updates: Sequence[LowRankUpdate], weights: Sequence[float] | None) -> Sequence[float]:
    if not updates:
        raise InputError("a merge needs at least one adapter, found none")
    if weights is None:
        return [1.0 / len(updates)] * len(updates)
    if len(weights) != len(updates):
        raise InputError(f"{len(weights)} weights for {len(updates)} adapters; expected one each")
    for index, weight in enumerate(weights, start=1):
        if not math.isfinite(weight):
            raise InputError(f"weight {index} is {weight}, expected a finite number")
    return weights


def _check_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise InputError(f"rank is {rank}, expected 1 or more")


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise InputError(f"density is {density}, expected more than 0 and at most 1")


def _check_same(updates: Sequence[LowRankUpdate]) -> None:
    """Equal shapes of the modules that several updates target."""
    seen: dict[str, int] = {}
    for index, update in enumerate(updates):
        for name in update.modules:
            first = seen.setdefault(name, index)
            if updates[first].shape(name) != update.shape(name):
                raise InputError(
                    f"{name}: adapter {first + 1} has shape {updates[first].shape(name)}, adapter "
                    f"{index + 1} {update.shape(name)}; expected adapters of one base"
                )
