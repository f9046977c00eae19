"""What a correction's file states, and what the corrections share.

A *component* is a kind of layer (q_proj, k_proj, …). A correction's parameters belong to a
component and are shared by all layers, so that its size does not grow with depth; ``per_layer``
gives every layer its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from caliport.calibrate.low_rank import LowRankUpdate, linear_shapes
from caliport.calibrate.parameters import parameters_of
from caliport.core.errors import InputError
from caliport.core.untrusted import shown

Pair = tuple[Tensor, Tensor]
"""A [R, in] and B [out, R]."""


@dataclass(frozen=True)
class Composition:
    """Adapters to compose, before the correction.

    Attributes:
        updates: The adapters by task.
        merged: The merge under the correction, by default
            ``caliport.calibrate.merges.linear.linear``;
            ``caliport.calibrate.merges.common.rank_zero`` is the paper's ablation without it.
        weights: One per adapter, where a correction that scales the adapters begins; None: 1/N.
    """

    updates: Mapping[str, LowRankUpdate]
    merged: LowRankUpdate
    weights: tuple[float, ...] | None = None

    @property
    def shares(self) -> dict[str, float]:
        """The weight of each adapter by its task."""
        weights = self.weights or [1 / len(self.updates)] * len(self.updates)
        return dict(zip(self.updates, weights, strict=True))


class Correction(nn.Module):
    """A correction of one composition, or of several that share it; its parameters are trained."""

    @abstractmethod
    def factors(self, composition: str, module: str) -> Pair:
        """A [R, in] and B [out, R] of the corrected update of one module, merge included."""


@dataclass(frozen=True)
class CorrectionType:
    """A kind of correction, as its file states it.

    Attributes:
        name: In recipes and after ``--method``.
        label: In tables and reports.
        source: Papers and equations.
        limits: What it needs; empty: nothing but a composition.
        alone: Whether it can be trained without the merged LoRAs (``-alone``); if not, ``limits``
            says why.
        merges: Whether there is a merge under it, so that ``merge`` and further modules apply; if
            not, it begins with the weights and has only the adapters' modules.
        per_layer: Whether it has the variant with a correction for every layer (``-per-layer``).
        build: From the compositions by name and ``per_layer`` to the untrained correction. Its
            further arguments are the correction's parameters; each has a default.
    """

    name: str
    label: str
    source: str
    limits: str
    alone: bool
    build: Callable[..., Correction]
    merges: bool = True
    per_layer: bool = True

    def __call__(
        self,
        compositions: Mapping[str, Composition],
        per_layer: bool = False,
        **parameters: Any,
    ) -> Correction:
        """Build the untrained correction."""
        return self.build(compositions, per_layer, **parameters)

    @property
    def parameters(self) -> dict[str, Any]:
        """Names and defaults of the correction's parameters."""
        return parameters_of(self.build, inputs=2)


def reaching(merged: LowRankUpdate, model: nn.Module, targets: Sequence[str]) -> LowRankUpdate:
    """The merge with ΔW = 0, of rank 0, in further modules, which a correction then reaches too.

    Args:
        merged: The merge.
        model: The base.
        targets: Last parts of the names of linear layers (``down_proj``), of all layers.

    Raises:
        InputError: No linear layer of the base has such a name; the message lists those there are.
    """
    shapes = linear_shapes(model)
    known = {name.rpartition(".")[2] for name in shapes}
    for target in targets:
        if target not in known:
            raise InputError(
                f"no linear layer of the base is called {shown(target)}; expected one of "
                f"{', '.join(sorted(known))}"
            )
    a, b = dict(merged.a), dict(merged.b)
    for name, (out, into) in shapes.items():
        if name not in a and name.rpartition(".")[2] in targets:
            a[name], b[name] = torch.zeros(0, into), torch.zeros(out, 0)
    return LowRankUpdate(a, b)


def component_of(module: str, shape: tuple[int, int]) -> str:
    """The component that a module belongs to: its last name and its shape (out, in).

    A few architectures have layers of different widths, which cannot share parameters.
    """
    return f"{module.rpartition('.')[2]}-{shape[0]}x{shape[1]}"


def corrected_update(correction: Correction, name: str, composition: Composition) -> LowRankUpdate:
    """The corrected composition as one update: LC has rank R + 1, LC++ R + s, scales Σ rᵢ.

    Args:
        correction: Trained or not; copied.
        name: The composition's name in the correction.
        composition: The composition.
    """
    modules = {m for u in (composition.merged, *composition.updates.values()) for m in u.modules}
    with torch.no_grad():
        pairs = {module: correction.factors(name, module) for module in sorted(modules)}
    return LowRankUpdate(
        {m: a.detach().cpu().clone() for m, (a, _) in pairs.items()},
        {m: b.detach().cpu().clone() for m, (_, b) in pairs.items()},
    )


class FrozenUpdate(nn.Module):
    """An update's A and B as buffers: moved with the correction, never trained."""

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


def freeze_updates(updates: Mapping[str, LowRankUpdate]) -> Mapping[str, FrozenUpdate]:
    """The updates by the same names, as a ``ModuleDict`` of buffers."""
    frozen = nn.ModuleDict({name: FrozenUpdate(update) for name, update in updates.items()})
    return cast("Mapping[str, FrozenUpdate]", frozen)


def parameter_names(updates: Sequence[LowRankUpdate], per_layer: bool) -> dict[str, str]:
    """By module, the name of the parameter that corrects it.

    That is the component, or with ``per_layer`` the module itself, with / for the dots that
    ``nn.ParameterDict`` does not allow.
    """
    return {
        module: module.replace(".", "/")
        if per_layer
        else component_of(module, update.shape(module))
        for update in updates
        for module in update.modules
    }


def parameter_shapes(
    names: Mapping[str, str], compositions: Mapping[str, Composition]
) -> dict[str, tuple[int, int]]:
    """(out, in) of the modules that a parameter corrects, by ``parameter_names``' names."""
    return {
        names[module]: c.merged.shape(module)
        for c in compositions.values()
        for module in c.merged.modules
    }
