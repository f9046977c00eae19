"""Low-rank terms of a composition beside a frozen base, split into shared and own terms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from caliport.calibrate.bases import note_base
from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.peft_files import read_update
from caliport.core.errors import InputError

_SAME = 1e-5


@dataclass(frozen=True)
class Composed:
    """A composition as the terms that a bundle computes: ΔW = w²·(Σ Bᵢ)(Σ Aᵢ) + B·A.

    The first term is the linear merge of shared adapters (Learnable Calibration, arXiv 2507.16083,
    Eq. 5, w = 1/N), so these are not copied for each composition; the second is its own term.

    Attributes:
        adapters: Names of the shared adapters; empty for a composition that shares none.
        weight: w.
        own: The composition's own update, or None.
    """

    adapters: tuple[str, ...]
    weight: float
    own: LowRankUpdate | None


def split(update: LowRankUpdate, adapters: Mapping[str, LowRankUpdate]) -> Composed:
    """Find the linear merge of some adapters inside a composed update.

    LC and LC++ append their correction to the merge: the first rows of A are w·Σ Aᵢ and the first
    columns of B are w·Σ Bᵢ. They are compared in every module with a relative tolerance of 1e-5;
    an update that is not such a merge is kept whole.

    Args:
        update: The composed update.
        adapters: Candidates for the merged adapters.
    """
    whole = Composed((), 1.0, update)
    fits = {n: a for n, a in adapters.items() if _could_hold(update, a)}
    if not fits:
        return whole
    first = update.modules[0]
    rank = next(iter(fits.values())).rank(first)
    columns = torch.stack([a.a[first].flatten() for a in fits.values()], dim=1).double()
    merged = update.a[first][:rank].flatten().double()
    found = torch.linalg.lstsq(columns, merged.unsqueeze(1)).solution
    weights = dict(zip(fits, found.flatten().tolist(), strict=True))
    used = tuple(name for name, weight in weights.items() if abs(weight) > 1e-3)
    if not used:
        return whole
    weight = weights[used[0]]
    if math.isclose(weight, 1 / len(used), rel_tol=_SAME):  # make programs identical
        weight = 1 / len(used)
    a, b, own_a, own_b = {}, {}, {}, {}
    for name in update.modules:
        rank = fits[used[0]].rank(name)
        a[name], own_a[name] = update.a[name][:rank], update.a[name][rank:].clone()
        b[name], own_b[name] = update.b[name][:, :rank], update.b[name][:, rank:].clone()
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


def read_updates(base: str | Path, adapters: Mapping[str, Path]) -> dict[str, LowRankUpdate]:
    """Read adapters and check, before any weight is read, that they fit the base.

    Args:
        base: A Hugging Face directory or hub name.
        adapters: PEFT LoRA directories by name.

    Raises:
        InputError: A base or adapter that cannot be read, an adapter of another base, or one that
            updates layers other than ``nn.Linear`` (GPT-2's ``Conv1D``).
    """
    from caliport.core.checkpoints import load_config
    from caliport.export.decoder.skeleton import empty
    from caliport.export.decoder.stored import reading

    whole = empty(load_config(base)[0])
    tied = {**(whole.all_tied_weights_keys or {})}
    with reading(base) as read:
        updates = {
            name: read_update(path, whole, lambda key: read(tied.get(key, key)))
            for name, path in adapters.items()
        }
    for name, update in updates.items():
        note_base(adapters[name], base)
        for module in update.modules:
            if not isinstance(layer := whole.get_submodule(module), nn.Linear):
                raise InputError(
                    f"{adapters[name]}: updates {module}, a {type(layer).__name__}; a bundle "
                    "supports updates of linear layers only, so fold this adapter instead"
                )
    return updates


def halves(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A [R, in] and B [out, R] in float16, scaled so that both stay within its range.

    Each row of A and its column of B are brought to similar magnitude: one is multiplied by a
    power of two and the other divided by it, so their product changes by rounding only.
    """
    least = torch.finfo(torch.float32).tiny
    rows, columns = (m.abs().amax(d).clamp_min(least).log2() for m, d in ((a, 1), (b, 0)))
    factor = ((columns - rows) / 2).round().exp2()
    return (a * factor[:, None]).half(), (b / factor).half()
