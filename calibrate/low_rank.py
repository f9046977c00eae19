"""``LowRankUpdate``: the one type of every adapter, merge and correction.

Each target module has a pair A [R, in] and B [out, R]. The adapter's scaling is already inside B,
so the weight update is exactly ΔW = B·A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import Tensor

from caliport.calibrate.names import names_in
from caliport.core.errors import InputError
from caliport.core.untrusted import shown

if TYPE_CHECKING:
    from torch import nn

LARGEST = 1e30
"""Largest value of A, B and ΔW, so that ΔW times any weight of a merge is finite in float32."""


@dataclass(frozen=True)
class LowRankUpdate:
    """A low-rank update of some linear layers of a base model.

    Attributes:
        a: A by module name, float32 [R, in].
        b: B by module name, float32 [out, R], with the scaling inside. R may differ by module.

    Raises:
        ValueError: A module without A or without B, or with different R in the two.
    """

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if self.a.keys() != self.b.keys():
            odd = sorted(self.a.keys() ^ self.b.keys())[0]
            raise ValueError(f"{odd}: needs both A and B")
        for name in self.a:
            if self.a[name].shape[0] != self.b[name].shape[1]:
                raise ValueError(
                    f"{name}: A is {tuple(self.a[name].shape)} and B is "
                    f"{tuple(self.b[name].shape)}; expected [R, in] and [out, R]"
                )

    def __repr__(self) -> str:
        ranks = sorted({self.rank(name) for name in self.a})
        shown = "–".join(str(rank) for rank in dict.fromkeys((*ranks[:1], *ranks[-1:])))
        count = f"{len(self.a)} modules, rank {shown or 0}, {self.parameter_count:,} values"
        return f"LowRankUpdate({count})"

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the updated modules in the base model, sorted."""
        return tuple(sorted(self.a))

    def rank(self, name: str) -> int:
        """R of one module."""
        return self.a[name].shape[0]

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of one module."""
        return self.b[name].shape[0], self.a[name].shape[1]

    def delta(self, name: str) -> Tensor:
        """ΔW = B·A of one module, float32 [out, in]."""
        return self.b[name] @ self.a[name]

    @property
    def parameter_count(self) -> int:
        """Number of values in all A and B."""
        return sum(t.numel() for pair in (self.a, self.b) for t in pair.values())

    @property
    def is_zero(self) -> bool:
        """Whether every ΔW is 0 because its A or its B is."""
        return not any(self.a[name].any() and self.b[name].any() for name in self.modules)

    def check_finite(self, source: object) -> None:
        """Check that no value of A, B or ΔW is NaN, infinite or above ``LARGEST``.

        No ΔW is built: the norms of B's rows and A's columns bound its values (Cauchy–Schwarz).

        Raises:
            InputError: There is such a value; ``source`` begins the message.
        """
        for name in self.modules:
            a, b = self.a[name].double(), self.b[name].double()
            if not a.numel() or not b.numel():
                continue
            bound = b.norm(dim=1).amax() * a.norm(dim=0).amax()
            if not max(float(a.abs().amax()), float(b.abs().amax()), float(bound)) <= LARGEST:
                raise InputError(
                    f"{source}: {name} has values that are not finite or above {LARGEST:g}, "
                    "its scaling included; expected finite weights"
                )

    def fitted(self, model: nn.Module, source: str | Path) -> LowRankUpdate:
        """The update with the base's names of its modules, checked as ``check_fits`` does."""
        known = {name for name, _ in model.named_modules()}
        names = names_in(known, self.modules, source)
        found = LowRankUpdate(
            {names[n]: t for n, t in self.a.items()}, {names[n]: t for n, t in self.b.items()}
        )
        found.check_fits(model, source)
        return found

    def check_fits(self, model: nn.Module, source: str | Path) -> None:
        """Check that every module is a linear layer of ``model`` of the right shape.

        Raises:
            InputError: A module that the base does not have, or one of another shape; ``source``
                names the adapter in the message.
        """
        shapes = linear_shapes(model)
        for name in self.modules:
            out, into = self.shape(name)
            found = shapes.get(name)
            if found is None:
                raise InputError(
                    f"{source}: module {name} is not a linear layer of the base; "
                    "the adapter was made for another base"
                )
            if found != (out, into):
                raise InputError(
                    f"{source}: {name} updates a [{out}, {into}] weight, the base has "
                    f"[{found[0]}, {found[1]}]; the adapter was made for another base"
                )


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer of a model by its name."""
    found = {name: _linear_shape(module) for name, module in model.named_modules()}
    return {name: shape for name, shape in found.items() if shape is not None}


def targeted(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers that ``targets`` name, as PEFT reads ``target_modules``.

    Args:
        model: The base.
        targets: Names of layers, or ends of names such as ``q_proj`` or ``self_attn.q_proj``.

    Raises:
        InputError: They name no layer, or one that is not linear; the message lists those there
            are.
    """
    linear = linear_shapes(model)
    named = [n for n, _ in model.named_modules() if n.endswith(tuple(f".{t}" for t in targets))]
    named += [n for n, _ in model.named_modules() if n in targets]
    odd = [name for name in named if name not in linear]
    if odd or not named:
        what = f"{odd[0]} is not a linear layer" if odd else "no layer of the base has such a name"
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise InputError(
            f"target_modules {shown(list(targets))}: {what}; expected some of {', '.join(known)}"
        )
    return named


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer or of transformers' Conv1D (GPT-2), None of others."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return cast(int, module.out_features), cast(int, module.in_features)
    if hasattr(module, "nf") and hasattr(module, "nx"):
        return cast(int, module.nf), cast(int, module.nx)
    return None
