"""Learnable Calibration: a few kilobytes trained on top of a frozen merge.

Source: "Efficient Compositional Multi-tasking for On-device Large Language Models"
(arXiv 2507.16083), Eq. 6 (LC) and Eq. 7 (LC++). The correction P is shared by all layers: one for
each component (q_proj, k_proj, …), so its size does not grow with depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibrate.low_rank import LowRankUpdate

Factors = Callable[[str], tuple[Tensor, Tensor]]
"""From a module's name to its current A [R, in] and B [out, R]."""


class Correction(Protocol):
    """What a calibrator trains: for each component a pair of factors."""

    def factors(self, component: str) -> tuple[Tensor, Tensor]:
        """A [s, in] and B [out, s] of one component."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What has gradients."""


def component_of(name: str, shape: tuple[int, int]) -> str:
    """The component that a module belongs to: its last name and its shape.

    The shape is part of it because a few architectures have layers of different widths, which
    cannot share one P.
    """
    return f"{name.rpartition('.')[2]}-{shape[0]}x{shape[1]}"


def components(update: LowRankUpdate) -> dict[str, tuple[int, int]]:
    """(out, in) of every component of an update."""
    shapes = {name: update.shape(name) for name in update.modules}
    return {component_of(name, shape): shape for name, shape in shapes.items()}


class LC(nn.Module):
    """ΔW = B'·A' + p·1ᵀ with p ∈ R^out, p = 0 at the start (Eq. 6).

    The paper prints a form that also reads as a product; with p = 0 that would erase the merge,
    so the sum is meant. p·1ᵀ is the rank-1 update A = 1ᵀ, B = p.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.p = nn.ParameterDict(
            {c: nn.Parameter(torch.zeros(out)) for c, (out, _) in shapes.items()}
        )
        self._ones = {c: torch.ones(1, into) for c, (_, into) in shapes.items()}

    def factors(self, component: str) -> tuple[Tensor, Tensor]:
        """A = 1ᵀ [1, in] and B = p [out, 1]."""
        p = self.p[component]
        return self._ones[component].to(p.device, p.dtype), p[:, None]


class LCPlusPlus(nn.Module):
    """ΔW = B'·A' + P2·P1 with P1 ∈ R^{s×in}, P2 ∈ R^{out×s} (Eq. 7; s = 4 in the paper).

    Initialised like a LoRA: P1 uniform as in PEFT, P2 zero.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], rank: int = 4) -> None:
        super().__init__()
        self.p1 = nn.ParameterDict()
        self.p2 = nn.ParameterDict()
        for component, (out, into) in shapes.items():
            p1 = nn.Parameter(torch.empty(rank, into))
            nn.init.kaiming_uniform_(p1, a=math.sqrt(5))
            self.p1[component] = p1
            self.p2[component] = nn.Parameter(torch.zeros(out, rank))

    def factors(self, component: str) -> tuple[Tensor, Tensor]:
        """A = P1 [s, in] and B = P2 [out, s]."""
        return self.p1[component], self.p2[component]


def corrected(merged: LowRankUpdate, correction: Correction) -> Factors:
    """Factors of merge plus correction: [A'; A_c] and [B' B_c], of rank r + s."""

    def factors(name: str) -> tuple[Tensor, Tensor]:
        a, b = correction.factors(component_of(name, merged.shape(name)))
        return torch.cat([merged.a[name], a]), torch.cat([merged.b[name], b], dim=1)

    return factors


def frozen(merged: LowRankUpdate, correction: Correction) -> LowRankUpdate:
    """Merge plus trained correction as one update: LC is rank r + 1, LC++ rank r + s."""
    factors = corrected(merged, correction)
    with torch.no_grad():
        pairs = {name: factors(name) for name in merged.modules}
    return LowRankUpdate(
        {n: a for n, (a, _) in pairs.items()}, {n: b for n, (_, b) in pairs.items()}
    )


@contextmanager
def attached(model: nn.Module, modules: tuple[str, ...], factors: Factors) -> Iterator[None]:
    """Let the named linear layers compute W0·x + B·(A·x) while the body runs.

    The base's weights are not touched, so they are bit-identical afterwards.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            a, b = factors(name)
            return output + functional.linear(functional.linear(inputs[0], a), b)

        return add

    handles: list[Any] = []
    try:
        for name in modules:
            handles.append(model.get_submodule(name).register_forward_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
