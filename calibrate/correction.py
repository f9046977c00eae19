"""What calibrators train on top of frozen adapters: LC, LC++ and column scales.

Sources: "Efficient Compositional Multi-tasking for On-device Large Language Models"
(arXiv 2507.16083), Eq. 6 (LC) and Eq. 7 (LC++); "ZipLoRA" (arXiv 2311.13600) and "Merging in a
Bottle: Differentiable Adaptive Merging" (arXiv 2410.08371) for the column scales.

A *component* is a kind of layer (q_proj, k_proj, …). The papers' LC and LC++ have one P for each
component, shared by all layers, so that their size does not grow with depth; ``per_layer`` gives
every layer its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from calibrate.low_rank import LowRankUpdate

Pair = tuple[Tensor, Tensor]
"""A [R, in] and B [out, R]."""


@dataclass(frozen=True)
class Composition:
    """What a correction stands on.

    Attributes:
        updates: The adapters by task.
        merged: Their merge, as a rule ``calibrate.merge.linear``; ``calibrate.merge.none`` leaves
            them out, which is the paper's ablation.
    """

    updates: Mapping[str, LowRankUpdate]
    merged: LowRankUpdate


class Correction(Protocol):
    """What a calibrator trains, for one composition or for several that share it."""

    def factors(self, composition: str, module: str) -> Pair:
        """A [R, in] and B [out, R] of the whole update of one module, merge included."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What has gradients."""


def component_of(module: str, shape: tuple[int, int]) -> str:
    """The component that a module belongs to: its last name and its shape.

    The shape is part of it because a few architectures have layers of different widths, which
    cannot share one P.
    """
    return f"{module.rpartition('.')[2]}-{shape[0]}x{shape[1]}"


class LC(nn.Module):
    """ΔW = B'·A' + p·1ᵀ with p ∈ R^out, p = 0 at the start (Eq. 6).

    The paper prints a form that also reads as a product; with p = 0 that would erase the merge,
    so the sum is meant. p·1ᵀ is the rank-1 update A = 1ᵀ, B = p.
    """

    def __init__(self, compositions: Mapping[str, Composition], per_layer: bool = False) -> None:
        super().__init__()
        self._merged = _held({name: c.merged for name, c in compositions.items()})
        self._owner = _owners([c.merged for c in compositions.values()], per_layer)
        self.p = nn.ParameterDict()
        self._ones = nn.ParameterDict()
        for owner, (out, into) in _shapes(self._owner, compositions).items():
            self.p[owner] = nn.Parameter(torch.zeros(out))
            self._ones[owner] = nn.Parameter(torch.ones(1, into), requires_grad=False)

    def factors(self, composition: str, module: str) -> Pair:
        """[A'; 1ᵀ] and [B' p], of rank R + 1."""
        owner = self._owner[module]
        a, b = self._merged[composition].pair(module)
        return torch.cat([a, self._ones[owner]]), torch.cat([b, self.p[owner][:, None]], dim=1)


class LCPlusPlus(nn.Module):
    """ΔW = B'·A' + P2·P1 with P1 ∈ R^{s×in}, P2 ∈ R^{out×s} (Eq. 7; s = 4 in the paper).

    Initialised like a LoRA: P1 uniform as in PEFT, P2 zero.
    """

    def __init__(
        self, compositions: Mapping[str, Composition], per_layer: bool = False, rank: int = 4
    ) -> None:
        super().__init__()
        self._merged = _held({name: c.merged for name, c in compositions.items()})
        self._owner = _owners([c.merged for c in compositions.values()], per_layer)
        self.p1 = nn.ParameterDict()
        self.p2 = nn.ParameterDict()
        for owner, (out, into) in _shapes(self._owner, compositions).items():
            self.p1[owner] = nn.Parameter(torch.empty(rank, into))
            nn.init.kaiming_uniform_(self.p1[owner], a=math.sqrt(5))
            self.p2[owner] = nn.Parameter(torch.zeros(out, rank))

    def factors(self, composition: str, module: str) -> Pair:
        """[A'; P1] and [B' P2], of rank R + s."""
        owner = self._owner[module]
        a, b = self._merged[composition].pair(module)
        return torch.cat([a, self.p1[owner]]), torch.cat([b, self.p2[owner]], dim=1)


class ColumnScales(nn.Module):
    """ΔW = Σᵢ Bᵢ·Aᵢ·diag(mᵢ) with mᵢ ∈ R^in, mᵢ = 1/N at the start (ZipLoRA, DAM).

    A scale belongs to an adapter and to a component, or with ``per_layer`` to one module as in
    the papers. Compositions that share an adapter share its scales.
    """

    def __init__(self, compositions: Mapping[str, Composition], per_layer: bool = False) -> None:
        super().__init__()
        updates = {t: u for c in compositions.values() for t, u in c.updates.items()}
        self._tasks = {name: tuple(c.updates) for name, c in compositions.items()}
        self._updates = _held(updates)
        self._owner = _owners(list(updates.values()), per_layer)
        share = {t: 1 / len(c.updates) for c in compositions.values() for t in c.updates}
        self.m = nn.ParameterDict()
        for task, update in updates.items():
            for module in update.modules:
                key = f"{task} {self._owner[module]}"
                if key not in self.m:
                    into = update.shape(module)[1]
                    self.m[key] = nn.Parameter(torch.full((into,), share[task]))

    def factors(self, composition: str, module: str) -> Pair:
        """[A₁·diag(m₁); A₂·diag(m₂); …] and [B₁ B₂ …], of rank Σ rᵢ."""
        rows, columns = [], []
        for task in self._tasks[composition]:
            held = self._updates[task]
            if module in held:
                a, b = held.pair(module)
                rows.append(a * self.m[f"{task} {self._owner[module]}"])
                columns.append(b)
        return torch.cat(rows), torch.cat(columns, dim=1)


CORRECTIONS = {"lc": LC, "lc++": LCPlusPlus, "scales": ColumnScales}


def frozen(correction: Correction, name: str, composition: Composition) -> LowRankUpdate:
    """The corrected composition as one update: LC is rank R + 1, LC++ R + s, scales Σ rᵢ."""
    modules = {m for u in (composition.merged, *composition.updates.values()) for m in u.modules}
    with torch.no_grad():
        pairs = {module: correction.factors(name, module) for module in sorted(modules)}
    return LowRankUpdate(
        {m: a.detach().cpu().clone() for m, (a, _) in pairs.items()},
        {m: b.detach().cpu().clone() for m, (_, b) in pairs.items()},
    )


class Held(nn.Module):
    """An update's matrices as buffers: they move with their owner and never have gradients."""

    def __init__(self, update: LowRankUpdate) -> None:
        super().__init__()
        self._index = {module: index for index, module in enumerate(update.modules)}
        for module, index in self._index.items():
            self.register_buffer(f"a{index}", update.a[module], persistent=False)
            self.register_buffer(f"b{index}", update.b[module], persistent=False)

    def __contains__(self, module: str) -> bool:
        return module in self._index

    def pair(self, module: str) -> Pair:
        """A [R, in] and B [out, R] of one module."""
        index = self._index[module]
        return self.get_buffer(f"a{index}"), self.get_buffer(f"b{index}")


def _held(updates: Mapping[str, LowRankUpdate]) -> Mapping[str, Held]:
    held = nn.ModuleDict({name: Held(update) for name, update in updates.items()})
    return cast("Mapping[str, Held]", held)


def _owners(updates: Sequence[LowRankUpdate], per_layer: bool) -> dict[str, str]:
    """For each module the name of the parameter that corrects it (no dots: they nest)."""
    return {
        module: module.replace(".", "/")
        if per_layer
        else component_of(module, update.shape(module))
        for update in updates
        for module in update.modules
    }


def _shapes(
    owner: Mapping[str, str], compositions: Mapping[str, Composition]
) -> dict[str, tuple[int, int]]:
    """(out, in) by owner."""
    return {
        owner[module]: c.merged.shape(module)
        for c in compositions.values()
        for module in c.merged.modules
    }
