"""What a merge's file states, and what the merges share.

A merge takes updates of one base and one weight per update; it never changes the updates. Weights
are 1/N by default, so merges are averages (0.5 each for two, as in the paper's baselines); weights
of 1 make sums. An update that does not target a module counts as ΔW = 0 there, in every merge but
``linear``, which refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.parameters import parameters_of
from caliport.core.errors import InputError

LARGEST_WEIGHT = 1_000_000
"""Largest weight of an adapter in a merge; with it, no ΔW that is read overflows float32."""
LARGEST_DENSE = 2**27
"""Most values of a dense ΔW: TIES and DARE hold some eight of its size, in all 4 GiB."""


@dataclass(frozen=True)
class Merge:
    """A merge that needs no data, as its file states it.

    Attributes:
        name: In recipes and after ``--method``.
        label: In tables and reports.
        source: Paper and equation or section.
        limits: Which adapters and weights it accepts; empty: any adapters of one base.
        difference: Why the merge differs from the exact weighted sum; empty: it does not.
        function: From updates and weights (None: 1/N each) to the merge. Its further arguments are
            the merge's parameters; each has a default.
    """

    name: str
    label: str
    source: str
    limits: str
    difference: str
    function: Callable[..., LowRankUpdate]

    def __call__(
        self,
        updates: Sequence[LowRankUpdate],
        weights: Sequence[float] | None = None,
        **parameters: Any,
    ) -> LowRankUpdate:
        """Merge.

        Raises:
            InputError: Updates, weights or parameters outside the merge's limits, or a merge whose
                values are not finite in float32.
        """
        merged = self.function(updates, weights, **parameters)
        merged.check_finite(f"{self.name} merge")
        return merged

    @property
    def parameters(self) -> dict[str, Any]:
        """Names and defaults of the merge's parameters."""
        return parameters_of(self.function, inputs=2)


@dataclass(frozen=True)
class WeightSearch:
    """A merge whose weights are found from a loss, as its file states it.

    Attributes:
        name: In recipes and after ``--method``.
        label: In tables and reports.
        source: Paper and equation or section.
        limits: Which adapters it accepts; empty: any adapters of one base.
        function: From updates and a loss of a merge to the merge and its weights. Its further
            arguments are the search's parameters; each has a default.
    """

    name: str
    label: str
    source: str
    limits: str
    function: Callable[..., tuple[LowRankUpdate, list[float]]]

    def __call__(
        self,
        updates: Sequence[LowRankUpdate],
        loss: Callable[[LowRankUpdate], float],
        **parameters: Any,
    ) -> tuple[LowRankUpdate, list[float]]:
        """Find the weights and merge with them.

        Raises:
            InputError: Updates or parameters outside the search's limits.
        """
        merged, weights = self.function(updates, loss, **parameters)
        merged.check_finite(f"{self.name} merge")
        return merged, weights

    @property
    def parameters(self) -> dict[str, Any]:
        """Names and defaults of the search's parameters."""
        return parameters_of(self.function, inputs=2)


def rank_zero(updates: Sequence[LowRankUpdate]) -> LowRankUpdate:
    """ΔW = 0, of rank 0, for every module that any update targets.

    A correction is trained on this in the paper's ablation "without the merged LoRAs"
    (arXiv 2507.16083). A is [0, in] and B [out, 0].

    Raises:
        InputError: No updates, or a module has different shapes in two of them.
    """
    resolve_weights(updates, None)
    check_shapes(updates)

    def empty(name: str) -> tuple[Tensor, Tensor]:
        part = next(u for u in updates if name in u.a)
        return part.a[name][:0], part.b[name][:, :0]

    return merge_by_module(updates, empty)


def merge_by_module(
    updates: Sequence[LowRankUpdate], merged: Callable[[str], tuple[Tensor, Tensor]]
) -> LowRankUpdate:
    """The update with A and B from ``merged(name)`` for each module that any update targets."""
    pairs = {name: merged(name) for name in sorted({n for u in updates for n in u.modules})}
    return LowRankUpdate(
        {n: a for n, (a, _) in pairs.items()}, {n: b for n, (_, b) in pairs.items()}
    )


def targeting(
    name: str, updates: Sequence[LowRankUpdate], weights: Sequence[float]
) -> tuple[list[LowRankUpdate], list[float]]:
    """The updates that target the module, and their weights."""
    pairs = [(u, w) for u, w in zip(updates, weights, strict=True) if name in u.a]
    return [u for u, _ in pairs], [w for _, w in pairs]


def concatenated(
    updates: Sequence[LowRankUpdate], weights: Sequence[float], name: str
) -> tuple[Tensor, Tensor]:
    """A [Σ rᵢ, in] and B [out, Σ rᵢ] of one module with B·A = Σ wᵢ·Bᵢ·Aᵢ."""
    pairs = list(zip(weights, updates, strict=True))
    return (
        torch.cat([u.a[name] for _, u in pairs], dim=0),
        torch.cat([w * u.b[name] for w, u in pairs], dim=1),
    )


def summed(terms: Sequence[Tensor]) -> Tensor:
    """Sum of tensors of one shape."""
    return torch.stack(list(terms)).sum(dim=0)


def resolve_weights(
    updates: Sequence[LowRankUpdate], weights: Sequence[float] | None
) -> Sequence[float]:
    """The weights, 1/N each for None.

    Raises:
        InputError: No updates, or not one weight per update, finite and at most ``LARGEST_WEIGHT``.
    """
    if not updates:
        raise InputError("a merge needs at least one adapter, found none")
    if weights is None:
        return [1.0 / len(updates)] * len(updates)
    if len(weights) != len(updates):
        raise InputError(f"{len(weights)} weights for {len(updates)} adapters; expected one each")
    for index, weight in enumerate(weights, start=1):
        check_weight(weight, f"weight {index}")
    return weights


def check_weight(weight: float, where: str) -> None:
    """Check one weight of a merge.

    Raises:
        InputError: It is NaN or beyond ``LARGEST_WEIGHT``; ``where`` names it.
    """
    if not -LARGEST_WEIGHT <= weight <= LARGEST_WEIGHT:
        raise InputError(
            f"{where} is {weight}, expected a finite number, at most {LARGEST_WEIGHT:,} either way"
        )


def check_dense(merge: str, updates: Sequence[LowRankUpdate]) -> None:
    """Check, before any is made, that the dense ΔW of every module fits into memory.

    Raises:
        InputError: A module of more than ``LARGEST_DENSE`` values.
    """
    for update in updates:
        for name in update.modules:
            out, into = update.shape(name)
            if out * into > LARGEST_DENSE:
                raise InputError(
                    f"{merge} merge: {name} is [{out}, {into}], a dense ΔW of {out * into:,} "
                    f"values; expected at most {LARGEST_DENSE:,} (exact, svd and slerp make none)"
                )


def check_rank(rank: int | None) -> None:
    """Check a rank to truncate to.

    Raises:
        InputError: It is below 1.
    """
    if rank is not None and rank < 1:
        raise InputError(f"rank is {rank}, expected 1 or more")


def check_density(density: float) -> None:
    """Check the share of values to keep.

    Raises:
        InputError: It is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise InputError(f"density is {density}, expected more than 0 and at most 1")


def check_shapes(updates: Sequence[LowRankUpdate]) -> None:
    """Check that a module has one shape in all updates that target it.

    Raises:
        InputError: Two updates have different shapes; the message names the module.
    """
    seen: dict[str, int] = {}
    for index, update in enumerate(updates):
        for name in update.modules:
            first = seen.setdefault(name, index)
            if updates[first].shape(name) != update.shape(name):
                raise InputError(
                    f"{name}: adapter {first + 1} has shape {updates[first].shape(name)}, adapter "
                    f"{index + 1} {update.shape(name)}; expected adapters of one base"
                )
