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

from calibrate.low_rank import LowRankUpdate
from calibrate.sparsify import disjoint, drop, factor, trim
from caliport_core.errors import InputError

# Above this |cosine| sinΩ is too small to divide by, and the arc is a line within 0.03 %.
_PARALLEL = 0.9995


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
    _check_equal(updates)
    _check_same(updates)
    pairs = list(zip(weights, updates, strict=True))
    names = updates[0].modules
    return LowRankUpdate(
        {n: _sum([w * u.a[n] for w, u in pairs]) for n in names},
        {n: _sum([w * u.b[n] for w, u in pairs]) for n in names},
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
    _check_same(updates)
    return _of_modules(
        updates, lambda name: _concatenated(*_targeting(name, updates, weights), name)
    )


def svd(
    updates: Sequence[LowRankUpdate],
    weights: Sequence[float] | None = None,
    rank: int | None = None,
) -> LowRankUpdate:
    """The best approximation of the exact sum that has a given rank, in every module.

    By Eckart–Young it keeps the largest singular values of Σ wᵢ·Bᵢ·Aᵢ; the squared error is the
    sum of the squares of the others. Computed from the concatenated factors B = Q₁R₁, Aᵀ = Q₂R₂
    and the small SVD of R₁·R₂ᵀ; ΔW is never formed.

    Args:
        updates: Adapters of any ranks and modules.
        weights: One a update; default 1/N each.
        rank: R of every module; default the largest single adapter's rank there, so that the
            merge costs what one adapter costs. Σ rᵢ or more keeps the sum exactly.

    Raises:
        InputError: A module has different shapes in two updates, or rank is below 1.
    """
    weights = _weights(updates, weights)
    _check_same(updates)
    _check_rank(rank)

    def truncated(name: str) -> tuple[Tensor, Tensor]:
        parts, shares = _targeting(name, updates, weights)
        a, b = (t.double() for t in _concatenated(parts, shares, name))
        q1, r1 = torch.linalg.qr(b)
        q2, r2 = torch.linalg.qr(a.T)
        u, s, vt = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
        keep = min(rank or max(part.rank(name) for part in parts), len(s))
        root = s[:keep].sqrt()
        return (root[:, None] * (vt[:keep] @ q2.T)).float(), ((q1 @ u[:, :keep]) * root).float()

    return _of_modules(updates, truncated)


def ties(
    updates: Sequence[LowRankUpdate],
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    rank: int | None = None,
) -> LowRankUpdate:
    """TIES: trim each ΔWᵢ, elect signs, average those that agree (arXiv 2306.01708, Section 3.2).

    It acts on the dense ΔWᵢ = Bᵢ·Aᵢ, where signs mean something (those of A and B do not: −B·−A is
    the same update), and trims module by module, as PEFT does, where the paper trims a whole model
    at once. The scale is the paper's mean over those that agree times λ = Σ |wᵢ|, so that weights
    1/N give λ = 1; ``calibrate.sparsify.disjoint`` has the formula. Where all values survive and
    agree it is the exact sum. (PEFT elects by the unweighted sum and divides by the number that
    agree, which with 1/N scales by 1/N twice.)

    Args:
        updates: Adapters of any ranks and modules.
        weights: One a update; default 1/N each.
        density: Share of values that trimming keeps, in (0, 1].
        rank: The result is not low-rank, so its largest R singular values are kept; default
            Σ rᵢ of the module, the cost of the exact sum. min(out, in) keeps all of it.

    Raises:
        InputError: A module has different shapes in two updates, or density or rank is out of
            range.
    """
    weights = _weights(updates, weights)
    _check_same(updates)
    _check_rank(rank)
    _check_density(density)

    def merged(name: str) -> tuple[Tensor, Tensor]:
        parts, shares = _targeting(name, updates, weights)
        dense = disjoint([trim(part.delta(name), density) for part in parts], shares)
        return factor(dense, rank or sum(part.rank(name) for part in parts))

    return _of_modules(updates, merged)


def dare(
    updates: Sequence[LowRankUpdate],
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    seed: int = 0,
    rank: int | None = None,
) -> LowRankUpdate:
    """DARE: drop values at random, rescale the others, sum (arXiv 2311.03099, Eq. 1).

    Each value of the dense ΔWᵢ is kept with probability ``density`` and divided by it, so that the
    expected merge is the exact sum Σ wᵢ·ΔWᵢ. Same seed, same result.

    Args:
        updates: Adapters of any ranks and modules.
        weights: One a update; default 1/N each.
        density: Share of values that are kept, in (0, 1].
        seed: Decides which.
        rank: The result is not low-rank, so its largest R singular values are kept; default
            Σ rᵢ of the module, the cost of the exact sum. min(out, in) keeps all of it.

    Raises:
        InputError: A module has different shapes in two updates, or density or rank is out of
            range.
    """
    weights = _weights(updates, weights)
    _check_same(updates)
    _check_rank(rank)
    _check_density(density)
    draw = torch.Generator().manual_seed(seed)

    def merged(name: str) -> tuple[Tensor, Tensor]:
        parts, shares = _targeting(name, updates, weights)
        terms = [
            w * drop(part.delta(name), density, draw) for w, part in zip(shares, parts, strict=True)
        ]
        return factor(_sum(terms), rank or sum(part.rank(name) for part in parts))

    return _of_modules(updates, merged)


def slerp(
    updates: Sequence[LowRankUpdate], weights: Sequence[float] | None = None
) -> LowRankUpdate:
    """Spherical interpolation of the flattened ΔW, module by module (Shoemake, SIGGRAPH 1985).

    For two, with t = w₂/(w₁ + w₂) and Ω the angle between ΔW₁ and ΔW₂,

        ΔW = sin((1−t)Ω)/sinΩ · ΔW₁ + sin(tΩ)/sinΩ · ΔW₂.

    The ΔW are interpolated as they are, not scaled to norm 1 first, so updates of equal norm keep
    that norm and others get one in between. More than two are folded in one after another: the
    third at t = w₃/(w₁ + w₂ + w₃), and so on, so their order matters a little. The result is a
    concatenation with other weights, of rank Σ rᵢ; norms and angles come from the factors,
    ⟨ΔW₁, ΔW₂⟩ = Σ (B₁ᵀB₂ ∘ A₁A₂ᵀ). Where Ω is undefined (a ΔW is 0 or not there) or sinΩ nearly 0
    (|cosΩ| > 0.9995: parallel or opposite), the weights are the line's, 1−t and t.

    Args:
        updates: Adapters of any ranks and modules.
        weights: One a update, none negative; only their ratios matter. Default equal.

    Raises:
        InputError: A module has different shapes in two updates, a weight is negative or all
            are 0.
    """
    weights = _weights(updates, weights)
    if min(weights) < 0 or sum(weights) <= 0:
        raise InputError(
            f"slerp merge: weights are {list(weights)}, expected none negative and not all 0"
        )
    _check_same(updates)

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
        return _concatenated(*_targeting(name, updates, shares.tolist()), name)

    return _of_modules(updates, merged)


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


# The merges that need neither data nor training, all with their defaults.
MERGES: dict[str, Callable[..., LowRankUpdate]] = {
    "linear": linear,
    "exact": exact,
    "svd": svd,
    "ties": ties,
    "dare": dare,
    "slerp": slerp,
}


def _arc(t: float, one: Tensor, two: Tensor, products: Tensor) -> tuple[float, float]:
    """What of two combinations of the ΔWᵢ lies at t on the arc between them.

    Args:
        t: 0 at the first, 1 at the second.
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


def _check_equal(updates: Sequence[LowRankUpdate]) -> None:
    """Equal modules and ranks, which adding A and B apart needs."""
    first = updates[0]
    for index, other in enumerate(updates[1:], start=2):
        if other.modules != first.modules:
            odd = sorted(set(first.modules) ^ set(other.modules))[0]
            raise InputError(
                f"linear merge: {odd} is in only one of adapters 1 and {index}; "
                "expected the same target modules (the exact merge takes any)"
            )
        for name in first.modules:
            if first.rank(name) != other.rank(name):
                raise InputError(
                    f"linear merge: {name} has rank {first.rank(name)} in adapter 1 and "
                    f"{other.rank(name)} in adapter {index}; expected equal ranks "
                    "(the exact merge takes any)"
                )
