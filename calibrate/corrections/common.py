"""What calibrators train on top of frozen adapters: LC, LC++ and column scales.

Sources: "Efficient Compositional Multi-tasking for On-device Large Language Models"
(arXiv 2507.16083), Eq. 6 (LC) and Eq. 7 (LC++); "ZipLoRA" (arXiv 2311.13600) and "Merging in a
Bottle: Differentiable Adaptive Merging" (arXiv 2410.08371) for the column scales.

A *component* is a kind of layer (q_proj, k_proj, …). The papers' LC and LC++ have one P for each
component, shared by all layers, so that their size does not grow with depth; ``per_layer`` gives
every layer its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from caliport.calibrate.low_rank import LowRankUpdate

Pair = tuple[Tensor, Tensor]
"""A [R, in] and B [out, R]."""


@dataclass(frozen=True)
class Composition:
    """What a correction stands on.

    Attributes:
        updates: The adapters by task.
        merged: Their merge, as a rule ``caliport.calibrate.merges.linear.linear``;
            ``caliport.calibrate.merges.common.none`` leaves them out, which is the paper's
            ablation.
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
