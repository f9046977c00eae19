"""Choose which layers of int4 stay at 8 bits: those that gain most for each byte.

Every layer's loss is measured after calibrated rounding, on text that was not calibrated on. Layers
go to 8 bits in order of loss per byte, until the whole model's loss or size is as wanted.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.errors import InputError
from caliport.core.places import replacing
from caliport.core.progress import at
from caliport.export.calibrated.sensitivity import (
    Divergence,
    Sensitivity,
    by_loss_per_byte,
    keep_at_int8,
    sensitivities,
    shipped_values,
)
from caliport.export.quantization.choices import Goal, Quantization
from caliport.export.quantization.tensors import KnownIntegers, plan_of
from caliport.export.quantization.text import cut

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANKING = 512
"""Tokens that each layer is measured on."""
MEASURING = 2048
"""Tokens that the whole model is measured on."""
_LOSSES = "losses.json"


@dataclass(frozen=True)
class Measured:
    """A decoder whose layers were measured.

    Attributes:
        how: How it is quantized, without layers kept for the goal.
        layers: Its layers that could be kept, and their losses.
        tokens: Number of tokens that ``divergence`` is of.
        divergence: Of the whole model from the float model, in nats per token, with some layers
            kept at 8 bits.
    """

    how: Quantization
    layers: Sequence[Sensitivity]
    tokens: int
    divergence: Callable[[Sequence[str]], float]

    def with_kept(self, names: Sequence[str]) -> Quantization:
        """The quantization with these layers at 8 bits too."""
        return replace(self.how, int8_layers=tuple(sorted({*self.how.int8_layers, *names})))

    def order(self) -> list[str]:
        """Names of the layers, those first that gain most for each byte."""
        return [layer.name for layer in by_loss_per_byte(self.layers)]


def measured(
    model: PreTrainedModel,
    how: Quantization,
    texts: Sequence[tuple[int, ...]],
    known: KnownIntegers,
    place: Path,
    key: Mapping[str, Any],
) -> Measured:
    """Measure every layer that int4 ships in 4 bits.

    Args:
        model: The float32 decoder, with its adapter folded in.
        how: How it is quantized; layers that it keeps at 8 bits are not measured.
        texts: Token ids that were not calibrated on.
        known: Its calibrated integers.
        place: A directory that keeps the losses, so that a killed run goes on where it was.
        key: What the losses depend on.
    """
    forms = plan_of(model, how)
    count = sum(form == "int4" for form in forms.values())
    ranking = cut(texts, RANKING)
    kept = _Kept(place / _LOSSES, {**key, "tokens": sum(map(len, ranking))})
    progress = iter(range(count))
    layers = []
    for layer in sensitivities(
        model,
        ranking,
        lambda name: at(f"measuring {name} at 4 bits", next(progress), count),
        forms=forms,
        known=known,
        done=kept.losses,
    ):
        kept.put(layer)
        layers.append(layer)
    whole = Divergence(model, texts)

    @cache
    def divergence(names: tuple[str, ...]) -> float:
        at(f"measuring with {len(names)} layers at 8 bits", count, count)
        at_8 = plan_of(model, found.with_kept(names))
        return whole.of(shipped_values(model, at_8, known))

    found = Measured(how, layers, whole.tokens, lambda names: divergence(tuple(sorted(names))))
    return found


def choose(goal: Goal, found: Measured, bytes_of: Callable[[Quantization], int]) -> list[str]:
    """Names of the layers to keep at 8 bits.

    Args:
        goal: What is wanted.
        found: The layers, and what they lose.
        bytes_of: Size of an artifact.

    Raises:
        InputError: The goal cannot be met even with no layer, or with all, at 8 bits.
    """
    if goal.most_bytes is not None:
        least = bytes_of(found.how)
        if least > goal.most_bytes:
            raise InputError(
                f"size: found {_size(least)} with every layer in 4 bits, expected at most "
                f"{_size(goal.most_bytes)}"
            )
        # Scales and padding differ too, so what a layer adds is a little off.
        names, order = keep_at_int8(found.layers, goal.most_bytes - least), found.order()
        while bytes_of(found.with_kept(names)) > goal.most_bytes:
            names.remove(max(names, key=order.index))
        return names
    assert goal.target_kl is not None
    target = goal.target_kl
    if (left := found.divergence(found.order())) > target:
        raise InputError(
            f"loss: found {left:.4f} nats a token with every layer in 8 bits, expected at most "
            f"{target:g}"
        )
    # By bytes and not by number of layers, so that a large one, such as the head, is passed over
    # where smaller ones do. The loss falls, nearly always, with more bytes.
    step = min(layer.extra_bytes for layer in found.layers)
    rooms = range(0, sum(layer.extra_bytes for layer in found.layers) + step, step)
    first = bisect_left(
        rooms,
        True,
        key=lambda room: found.divergence(keep_at_int8(found.layers, room)) <= target,
    )
    return keep_at_int8(found.layers, rooms[first])


class _Kept:
    """Losses by layer in a file, for one key."""

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self._path, self._key = path, json.loads(json.dumps(key, default=str))
        self.losses: dict[str, float] = {}
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["key"] == self._key:
                self.losses = content["layers"]

    def put(self, layer: Sensitivity) -> None:
        if layer.name not in self.losses:
            self.losses = {**self.losses, layer.name: layer.divergence}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as beside:
                beside.write_text(json.dumps({"key": self._key, "layers": self.losses}))


def _size(count: float) -> str:
    return f"{count / 1e6:.1f} MB"
