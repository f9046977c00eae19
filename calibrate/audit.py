"""How much adapters overlap, and how far each merge is from their weighted sum.

Nothing is trained for this, and no ΔW [out, in] is built: norms and inner products are sums over
[r, r] matrices, and singular values and angles come from a QR decomposition of each factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.merges.common import Merge
from caliport.core.errors import InputError

Verdict = Literal["exact", "close", "approximate", "far", "does not apply", "undefined"]

# Largest relative error of each verdict. Rounding in float32 gives an exact merge about 1e-7.
EXACT = 1e-5
# The difference has at most 1 % of the sum's energy ‖ΔW‖².
CLOSE = 0.1
# An error of e means a cosine of at least √(1 − e²) to the sum. Up to 0.5, at least 3/4 of the
# merge's energy is therefore along the sum, and a merge that only cuts the sum keeps at least 3/4.
FAR = 0.5
# No adapter at all, ΔW = 0, has error 1.
NOTHING = 1.0


@dataclass(frozen=True)
class Part:
    """One adapter's update of one module.

    Attributes:
        norm: ‖ΔW‖_F.
        rank: Nominal rank: R of its A and B.
        numerical_rank: Singular values above max(out, in)·ε·σ₁, ε of float32 (the usual rule,
            as in ``torch.linalg.matrix_rank``).
        effective_rank: exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ/Σσ (Roy & Vetterli 2007): R where all
            directions are equally strong, near 1 where one has nearly all; 0 for ΔW = 0.
    """

    norm: float
    rank: int
    numerical_rank: int
    effective_rank: float


@dataclass(frozen=True)
class Cosines:
    """Cosines of the principal angles between two spaces: 1 a shared direction, 0 none.

    Attributes:
        mean, highest: Over the min(k₁, k₂) angles between spaces of k₁ and k₂ dimensions.
        chance: √(max(k₁, k₂)/n): the root mean square of the cosines of two random spaces in n
            dimensions, so an upper bound of their expected mean.
    """

    mean: float
    highest: float
    chance: float


@dataclass(frozen=True)
class Overlap:
    """Two adapters in one module.

    Attributes:
        first, second: Their positions among the adapters.
        cosine: ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖·‖ΔW₂‖) of the flattened updates.
        columns: Angles of the column spaces, in R^out: what they write.
        rows: Angles of the row spaces, in R^in: what they read.
    """

    first: int
    second: int
    cosine: float
    columns: Cosines
    rows: Cosines


@dataclass(frozen=True)
class ModuleAudit:
    """One module: a part for each adapter, None if the adapter does not target the module.

    A pair has no overlap if one of the two is missing or zero.
    """

    name: str
    shape: tuple[int, int]
    parts: tuple[Part | None, ...]
    overlaps: tuple[Overlap, ...]


@dataclass(frozen=True)
class Departure:
    """How a merge M differs from the weighted sum S = Σ wᵢΔWᵢ: M = kept·S + rest, rest ⟂ S.

    Attributes:
        residual: ‖M − S‖_F.
        sum_norm: ‖S‖_F; 0 if it is within the rounding of its factors.
        product: ⟨M, S⟩.
    """

    residual: float
    sum_norm: float
    product: float

    @property
    def error(self) -> float | None:
        """‖M − S‖ / ‖S‖; None if the sum is zero."""
        return self.residual / self.sum_norm if self.sum_norm else None

    @property
    def kept(self) -> float | None:
        """⟨M, S⟩ / ‖S‖²: the multiple of the sum that the merge keeps; None if the sum is zero."""
        return self.product / self.sum_norm**2 if self.sum_norm else None

    @property
    def rest(self) -> float | None:
        """Norm of the part of M orthogonal to S, relative to ‖S‖; None if the sum is zero."""
        if self.error is None or self.kept is None:
            return None
        return math.sqrt(max(self.error**2 - (1 - self.kept) ** 2, 0.0))


@dataclass(frozen=True)
class MergeAudit:
    """A merge compared with the weighted sum, or the reason why it does not apply.

    Attributes:
        merge: Its name.
        departures: By module; empty if the merge does not apply.
        difference: Why this kind of merge differs from the sum; may be empty.
        refused: Why it does not apply to these adapters; None if it does.
    """

    merge: str
    departures: Mapping[str, Departure]
    difference: str = ""
    refused: str | None = None

    @property
    def total(self) -> Departure:
        """Over all modules as one vector: √Σ‖M − S‖² against √Σ‖S‖²."""
        found = self.departures.values()
        return Departure(
            math.sqrt(sum(d.residual**2 for d in found)),
            math.sqrt(sum(d.sum_norm**2 for d in found)),
            sum(d.product for d in found),
        )

    @property
    def verdict(self) -> Verdict:
        """The verdict on the relative error over all modules."""
        if self.refused is not None:
            return "does not apply"
        error = self.total.error
        if error is None:
            return "undefined"
        if error <= EXACT:
            return "exact"
        if error <= CLOSE:
            return "close"
        return "approximate" if error <= FAR else "far"

    @property
    def text(self) -> str:
        """The verdict in words."""
        total = self.total
        if self.refused is not None:
            return f"does not apply: {self.refused}"
        if total.error is None or total.kept is None:
            return "no relative error: the weighted sum is zero"
        if self.verdict == "exact":
            return "equal to the weighted sum up to rounding"
        words = {"close": "close to exact", "approximate": "approximate", "far": "far from exact"}
        nothing = ", no closer than no adapter at all" if total.error >= NOTHING else ""
        why = f"; {self.difference}" if self.difference else ""
        return (
            f"{words[self.verdict]}, relative error {_two(total.error)} over all modules{nothing}: "
            f"it is {total.kept:.2f} times the weighted sum plus a rest of {total.rest:.2f} of "
            f"the sum's norm that points elsewhere{why}"
        )


def check_one_base(updates: Mapping[str, LowRankUpdate]) -> None:
    """Check that there are several adapters, and that modules they share have one shape.

    Raises:
        InputError: Fewer than two adapters, or a module of two shapes; it names the adapters.
    """
    if len(updates) < 2:
        raise InputError(f"an audit compares adapters: found {len(updates)}, expected 2 or more")
    seen: dict[str, str] = {}
    for adapter, update in updates.items():
        for name in update.modules:
            other = seen.setdefault(name, adapter)
            if updates[other].shape(name) != update.shape(name):
                raise InputError(
                    f"{name}: adapter {other} updates a {list(updates[other].shape(name))} "
                    f"weight, adapter {adapter} one of {list(update.shape(name))}; expected "
                    "adapters of one base"
                )


def audit_module(updates: Sequence[LowRankUpdate], name: str) -> ModuleAudit:
    """Norms, ranks and overlaps of all adapters in one module.

    Raises:
        ValueError: No adapter targets the module.
    """
    owner = next((u for u in updates if name in u.a), None)
    if owner is None:
        raise ValueError(f"{name}: no adapter updates it")
    spaces = [_Spaces.of(u, name) if name in u.a else None for u in updates]
    parts = [s.part(u.rank(name)) if s else None for s, u in zip(spaces, updates, strict=True)]
    overlaps = []
    for first, second in combinations(range(len(updates)), 2):
        one, other = spaces[first], spaces[second]
        if one is None or other is None or not len(one.values) or not len(other.values):
            continue
        product = inner(updates[first], updates[second], name)
        cosine = product / float(one.values.norm() * other.values.norm())
        overlaps.append(
            Overlap(
                first,
                second,
                min(max(cosine, -1.0), 1.0),
                _cosines(one.columns, other.columns),
                _cosines(one.rows, other.rows),
            )
        )
    return ModuleAudit(name, owner.shape(name), tuple(parts), tuple(overlaps))


def audit_merge(
    updates: Sequence[LowRankUpdate],
    weights: Sequence[float],
    wanted: LowRankUpdate,
    merge: Merge,
) -> MergeAudit:
    """Compare one merge with the exact weighted sum, module by module.

    Args:
        updates: The adapters.
        weights: One per adapter.
        wanted: Their weighted sum, from ``caliport.calibrate.merges.exact.exact``.
        merge: The merge, with default parameters; if it raises ``InputError``, it does not apply.
    """
    try:
        merged = merge(updates, weights)
    except InputError as error:
        refused = str(error).removeprefix(f"{merge.name} merge: ")
        return MergeAudit(merge.name, {}, refused=refused)
    departures = {module: departure(merged, wanted, module) for module in wanted.a}
    return MergeAudit(merge.name, departures, merge.difference)


def departure(merged: LowRankUpdate, wanted: LowRankUpdate, name: str) -> Departure:
    """How one module of a merge differs from the weighted sum.

    ‖M − S‖² = ‖M‖² − 2⟨M, S⟩ + ‖S‖², in float64 to resolve errors down to 1e-8. A module that the
    merge leaves out counts as zero.
    """
    norm = norm_of(wanted, name)
    if name not in merged.a:
        return Departure(norm, norm, 0.0)
    product = inner(merged, wanted, name) if norm else 0.0
    residual = inner(merged, merged, name) - 2 * product + norm**2
    return Departure(math.sqrt(max(residual, 0.0)), norm, product)


def norm_of(update: LowRankUpdate, name: str) -> float:
    """‖ΔW‖_F; 0 if it is within float32 rounding of A and B."""
    square = inner(update, update, name)
    rounding = torch.finfo(torch.float32).eps * float(update.a[name].norm() * update.b[name].norm())
    return math.sqrt(square) if square > rounding**2 else 0.0


def inner(first: LowRankUpdate, second: LowRankUpdate, name: str) -> float:
    """⟨ΔW₁, ΔW₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ), both [R₁, R₂], in float64."""
    outer = first.b[name].double().T @ second.b[name].double()
    into = first.a[name].double() @ second.a[name].double().T
    return float((outer * into).sum())


@dataclass(frozen=True)
class _Spaces:
    """Thin singular value decomposition of ΔW, cut to its numerical rank k.

    ``columns`` [out, k], ``values`` [k], ``rows`` [in, k]. With B = Q₁R₁ and Aᵀ = Q₂R₂, only the
    small R₁R₂ᵀ is decomposed.
    """

    columns: Tensor
    values: Tensor
    rows: Tensor

    @classmethod
    def of(cls, update: LowRankUpdate, name: str) -> _Spaces:
        left, outer = torch.linalg.qr(update.b[name].double())
        right, into = torch.linalg.qr(update.a[name].double().T)
        u, values, vt = torch.linalg.svd(outer @ into.T, full_matrices=False)
        limit = max(update.shape(name)) * torch.finfo(torch.float32).eps * values[:1]
        rank = int((values > limit).sum())
        return cls(left @ u[:, :rank], values[:rank], right @ vt[:rank].T)

    def part(self, rank: int) -> Part:
        shares = self.values / self.values.sum()
        entropy = float(-(shares * shares.log()).sum())
        effective = math.exp(entropy) if len(self.values) else 0.0
        return Part(float(self.values.norm()), rank, len(self.values), effective)


def _two(value: float) -> str:
    """Two decimals, or two significant digits below 0.1."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _cosines(first: Tensor, second: Tensor) -> Cosines:
    """Singular values of QᵀP for orthonormal bases [n, k₁] and [n, k₂] (Björck & Golub 1973)."""
    values = torch.linalg.svdvals(first.T @ second).clamp(0, 1)
    most = max(first.shape[1], second.shape[1])
    return Cosines(float(values.mean()), float(values.max()), math.sqrt(most / len(first)))
