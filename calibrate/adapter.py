"""``Adapter``: all that a PEFT adapter changes in a base, for a fold; mostly a low-rank update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.names import names_in
from caliport.core.errors import InputError

if TYPE_CHECKING:
    from torch import nn

_T = TypeVar("_T")
SAVED = (
    "a layer of the base saved along with the adapter, which may differ from the base as "
    "published; save the adapter again with save_embedding_layers=False"
)


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes in a base.

    With W' = W0 + B·A, the weight of an updated module becomes m·W'/‖W'‖, where ‖·‖ is the norm of
    each row, of an embedding that of each column (DoRA), or W' if it has no magnitude m.

    Attributes:
        update: Updates of linear layers.
        embeddings: Updates of embeddings: A [R, width] and B [rows, R].
        magnitudes: m [out] by module, of an embedding [width].
        biases: What is added to a module's bias, by module.
        replaced: New values of parameters, by parameter. A parameter that is shared (a head tied to
            the embedding) is replaced at this name only.
        saved: Weights of the base that were saved along with the adapter, by parameter.
        bias: Which biases were trained and are all in ``replaced``: PEFT's ``none``, ``all`` or
            ``lora_only``.
        beyond: Why it is more than a low-rank update, by the setting; empty if it is none.
    """

    update: LowRankUpdate
    embeddings: LowRankUpdate = field(default_factory=lambda: LowRankUpdate({}, {}))
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    bias: str = "none"
    beyond: Mapping[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> frozenset[str]:
        """Names of all parameters that a fold changes."""
        modules = {*self.update.modules, *self.embeddings.modules}
        weights = {f"{name}.weight" for name in modules}
        return frozenset(weights | {f"{name}.bias" for name in self.biases} | {*self.replaced})

    @property
    def is_zero(self) -> bool:
        """Whether it changes nothing because every ΔW is 0."""
        more = self.magnitudes or self.replaced or any(t.any() for t in self.biases.values())
        return not more and self.update.is_zero and self.embeddings.is_zero

    def low_rank(self, source: str | Path) -> LowRankUpdate:
        """The adapter as updates of linear layers alone.

        Raises:
            InputError: It is more than that, or has weights of the base that were not compared
                (``check_saved``); the message says why and what to do.
        """
        for reason in self.beyond.values():
            raise InputError(reason)
        for name in self.saved:
            raise InputError(f"{source}: {name}: {SAVED}")
        return self.update

    def fitted(self, model: nn.Module, source: str | Path) -> Adapter:
        """The adapter with the base's names, checked against the base's modules and shapes.

        Args:
            model: The base, on any device.
            source: Names the adapter in messages.

        Raises:
            InputError: A module or parameter that the base does not have, or of another shape.
        """
        modules = dict(model.named_modules())
        parameters = dict(model.named_parameters(remove_duplicate=False))
        found = replace(
            self,
            embeddings=_renamed_update(self.embeddings, modules, source),
            magnitudes=_renamed(self.magnitudes, modules, source),
            biases=_renamed(self.biases, modules, source),
            replaced=_renamed(self.replaced, parameters, source),
            saved=_renamed(self.saved, parameters, source),
        )
        shapes = {f"{n}.weight": found.embeddings.shape(n) for n in found.embeddings.modules}
        shapes |= {f"{n}.bias": tuple(t.shape) for n, t in found.biases.items()}  # type: ignore[misc]
        shapes |= {n: tuple(t.shape) for n, t in (found.replaced | found.saved).items()}  # type: ignore[operator]
        for name, shape in shapes.items():
            _check_shape(parameters.get(name), name, shape, source)
        found = replace(found, update=self.update.fitted(model, source))
        for name in found.embeddings.modules:
            if not isinstance(modules[name], torch.nn.Embedding):
                raise InputError(f"{source}: {name} is not an embedding of the base")
        for name, magnitude in found.magnitudes.items():
            wide = name in found.embeddings.a
            count = found.embeddings.shape(name)[1] if wide else found.update.shape(name)[0]
            if tuple(magnitude.shape) != (count,):
                raise InputError(
                    f"{source}: {name} has {list(magnitude.shape)} magnitudes, expected [{count}]"
                )
        for name in parameters:
            trained = self.bias == "all" or name.removesuffix(".bias") in found.update.modules
            missing = name.endswith(".bias") and name not in found.replaced
            if self.bias != "none" and trained and missing:
                raise InputError(f"{source}: bias = {self.bias!r}, but {name} is not in the file")
        return found

    def check_saved(self, read: Callable[[str], Tensor], source: str | Path) -> Adapter:
        """Check that weights saved along with the adapter are the base's; the adapter without them.

        Args:
            read: Reads a parameter of the base by name.
            source: Names the adapter in messages.

        Raises:
            InputError: One differs.
        """
        for name, tensor in self.saved.items():
            if not torch.equal(read(name).cpu().to(tensor.dtype), tensor):
                raise InputError(
                    f"{source}: {name} was saved along with the adapter and differs from the "
                    "base's; give the base that it was trained on, or save what was trained as "
                    "modules_to_save"
                )
        return replace(self, saved={})


def _renamed(
    values: Mapping[str, _T], known: Mapping[str, object], source: object
) -> dict[str, _T]:
    names = names_in(known, values, source)
    return {names[name]: value for name, value in values.items()}


def _renamed_update(
    update: LowRankUpdate, known: Mapping[str, object], source: object
) -> LowRankUpdate:
    return LowRankUpdate(_renamed(update.a, known, source), _renamed(update.b, known, source))


def _check_shape(
    parameter: Tensor | None, name: str, shape: tuple[int, ...], source: str | Path
) -> None:
    if parameter is None:
        raise InputError(
            f"{source}: {name} is not in the base; the adapter was made for another base"
        )
    if parameter.shape == shape:
        return
    advice = "the adapter was made for another base"
    if len(shape) == 2 == parameter.dim() and parameter.shape[1] == shape[1]:
        advice = (
            f"the vocabulary was resized from {parameter.shape[0]:,} to {shape[0]:,} in training; "
            "resize the base's (resize_token_embeddings), save it with the tokenizer of the "
            "training, and give this as the base"
        )
    raise InputError(
        f"{source}: {name} has shape {list(shape)}, the base's {list(parameter.shape)}; {advice}"
    )
