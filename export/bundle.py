"""What a bundle is made of: shared single-task adapters, and compositions that stand on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from calibrate.low_rank import LowRankUpdate

_SAME = 1e-5


@dataclass(frozen=True)
class Composed:
    """A composition as the terms that a bundle computes: ΔW = w²·(Σ Bᵢ)(Σ Aᵢ) + B·A.

    The first term is the linear merge of shared adapters (Learnable Calibration, arXiv 2507.16083,
    Eq. 5, w = 1/N), which so need no copy for each composition; the second is its own.

    Attributes:
        adapters: Names of the shared adapters; none for a composition that is all its own.
        weight: w.
        own: The composition's own update, or None.
    """

    adapters: tuple[str, ...]
    weight: float
    own: LowRankUpdate | None


def split(update: LowRankUpdate, adapters: Mapping[str, LowRankUpdate]) -> Composed:
    """Find the linear merge of some adapters inside a composed update.

    LC and LC++ put their correction behind the merge: the first rows of A are w·Σ Aᵢ and the first
    columns of B are w·Σ Bᵢ. They are compared in every module to a relative 1e-5, so an update
    that is no such merge is kept whole.

    Args:
        update: The composed update.
        adapters: Those that may lie underneath.
    """
    whole = Composed((), 1.0, update)
    fits = {n: a for n, a in adapters.items() if _could_hold(update, a)}
    if not fits:
        return whole
    first = update.modules[0]
    rank = next(iter(fits.values())).rank(first)
    columns = torch.stack([a.a[first].flatten() for a in fits.values()], dim=1)
    found = torch.linalg.lstsq(columns, update.a[first][:rank].flatten().unsqueeze(1)).solution
    weights = dict(zip(fits, found.flatten().tolist(), strict=True))
    used = tuple(name for name, weight in weights.items() if abs(weight) > 1e-3)
    if not used:
        return whole
    weight = weights[used[0]]
    a, b, own_a, own_b = {}, {}, {}, {}
    for name in update.modules:
        rank = fits[used[0]].rank(name)
        a[name], own_a[name] = update.a[name][:rank], update.a[name][rank:]
        b[name], own_b[name] = update.b[name][:, :rank], update.b[name][:, rank:]
        for part, parts in ((a[name], "a"), (b[name], "b")):
            total = weight * sum(getattr(fits[n], parts)[name] for n in used)
            if not _is_same(part, total):
                return whole
    rest = all(not tensor.numel() for tensor in own_a.values())
    own = None if rest else LowRankUpdate(own_a, own_b)
    return Composed(used, weight, own)


def _could_hold(update: LowRankUpdate, adapter: LowRankUpdate) -> bool:
    return update.modules == adapter.modules and all(
        update.rank(n) >= adapter.rank(n) and update.shape(n) == adapter.shape(n)
        for n in update.modules
    )


def _is_same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= _SAME * other.norm().clamp_min(1e-12))
