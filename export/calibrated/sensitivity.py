"""Measure how much each linear layer loses at 4 bits.

One layer at a time gets the values that int4 ships while all others stay float, and the next-token
distributions are compared with the float model's. A layer's inputs are kept from the float model,
so a measurement runs only that layer and those after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from caliport.core.errors import InputError
from caliport.export.decoder.skeleton import group_layers, marked
from caliport.export.quantization.choices import Form
from caliport.export.quantization.tensors import (
    KnownIntegers,
    known_owners,
    plan,
    rounded,
    unpacked,
    values_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sensitivity:
    """What one layer loses at 4 bits.

    Attributes:
        name: Name of the layer.
        values: Number of its weights.
        divergence: Mean Kullback-Leibler divergence in nats per token, from the float model to the
            model with this layer at 4 bits.
    """

    name: str
    values: int
    divergence: float

    @property
    def extra_bytes(self) -> int:
        """Extra bytes of 8 bits over 4, without scales."""
        return self.values // 2


class Divergence:
    """Distance of a float decoder from itself with other weights, on a few texts.

    Args:
        model: A float32 decoder; restored after every measurement.
        texts: Token ids, such as prompts with their answers.

    Attributes:
        tokens: Number of tokens of all texts.

    Raises:
        InputError: No texts.
    """

    def __init__(self, model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> None:
        self._texts = [torch.tensor([list(text)]) for text in texts if len(text)]
        if not self._texts:
            raise InputError("sensitivity: found no prompts, expected at least one")
        self.tokens = sum(text.numel() for text in self._texts)
        self._model = model
        layers = group_layers(model)
        self._path, self._count = layers.path, len(layers.stands_for)
        self._hidden: list[list[Tensor]] = []
        self._before = [self._log_probabilities(text) for text in self._texts]

    def of(self, values: Mapping[str, Callable[[], Tensor]]) -> float:
        """Mean Kullback-Leibler divergence in nats per token, from the float model.

        Args:
            values: By module name, what gives its weight; called once for each text.
        """
        first = min(map(self._layer_of, values), default=0)
        if first and not self._hidden:
            self._hidden = [self._states(text) for text in self._texts]
        with _replaced(self._model, values):
            total = sum(
                float(
                    nn.functional.kl_div(
                        self._from(first, number), before, log_target=True, reduction="sum"
                    )
                )
                for number, before in enumerate(self._before)
            )
        return total / self.tokens

    def _layer_of(self, name: str) -> int:
        """The layer from which on the model has to run; 0 for what comes before the layers."""
        model = self._model
        if self._path and name.startswith(f"{self._path}."):
            return int(name.removeprefix(f"{self._path}.").partition(".")[0])
        is_head = model.get_submodule(name) is model.get_output_embeddings()
        return self._count if is_head and self._path else 0

    def _states(self, text: Tensor) -> list[Tensor]:
        """What each layer of the float model gets, and what the last one gives."""
        hidden: list[Tensor] = []

        def keep(state: Tensor, _: int) -> Tensor:
            hidden.append(state)
            return state

        with marked(self._model, self._path, keep):
            self._log_probabilities(text)
        return hidden

    def _from(self, layer: int, number: int) -> Tensor:
        if layer == 0:
            return self._log_probabilities(self._texts[number])
        hidden = self._hidden[number]

        def put(state: Tensor, index: int) -> Tensor:
            return hidden[layer] if index == layer else state

        with (
            marked(self._model, self._path, put),
            _skipped(self._model.get_submodule(self._path), layer),
        ):
            return self._log_probabilities(self._texts[number])

    def _log_probabilities(self, text: Tensor) -> Tensor:
        with torch.no_grad():
            logits = self._model(text, use_cache=False).logits[0]
        return nn.functional.log_softmax(logits.float(), dim=-1)


@contextmanager
def _skipped(layers: nn.Module, count: int) -> Iterator[None]:
    """While the body runs, the first layers return what they get."""
    first = list(layers.children())[:count]

    def skip(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    for layer in first:
        layer.forward = skip
    try:
        yield
    finally:
        for layer in first:
            del layer.forward


@contextmanager
def _replaced(model: nn.Module, values: Mapping[str, Callable[[], Tensor]]) -> Iterator[None]:
    """While the body runs, each module has another weight, but only while it runs itself."""
    hooks, kept = [], {}

    def before(module: nn.Module, _: Any) -> None:
        kept[module] = module.weight
        module.weight = nn.Parameter(given[module](), requires_grad=False)

    def after(module: nn.Module, _: Any, __: Any) -> None:
        module.weight = kept.pop(module)

    given = {model.get_submodule(name): value for name, value in values.items()}
    for module in given:
        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, weight in kept.items():
            module.weight = weight


def shipped_values(
    model: PreTrainedModel, forms: Mapping[str, Form], known: KnownIntegers | None = None
) -> dict[str, Callable[[], Tensor]]:
    """What gives the values q · scale that ship for each layer and embedding, by module name.

    Args:
        model: A float32 decoder.
        forms: How each of them ships.
        known: Integers to take in place of quantizing; a tied embedding takes the head's.
    """
    owners = known_owners(model, forms, known)

    def value(name: str) -> Tensor:
        if known is not None and name in owners:
            data, scale = known.parts(owners[name])
            return values_of(unpacked(data), scale.float())
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return rounded(weight.detach(), forms[name])

    return {name: lambda name=name: value(name) for name in forms}  # type: ignore[misc]


def sensitivities(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    on_layer: Callable[[str], None] = lambda name: None,
    *,
    forms: Mapping[str, Form] | None = None,
    known: KnownIntegers | None = None,
    done: Mapping[str, float] | None = None,
) -> Iterator[Sensitivity]:
    """Measure every linear layer that ships in 4 bits.

    A tied head is measured with the embedding, which has the same integers.

    Args:
        model: A float32 decoder; restored after every layer.
        prompts: Token ids, such as prompts with their answers.
        on_layer: Called with each layer's name before it is measured.
        forms: How the layers ship; default as int4 does.
        known: Integers to take in place of quantizing without text.
        done: Divergences that were measured before, by name.

    Raises:
        InputError: No prompts.
    """
    forms, done = forms or plan(model, "int4"), done or {}
    values = shipped_values(model, forms, known)
    divergence = Divergence(model, prompts)
    for name, form in forms.items():
        if form != "int4":
            continue
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        on_layer(name)
        found = done.get(name)
        if found is None:
            same = [n for n in forms if model.get_submodule(n).weight is weight and "4" in forms[n]]
            found = divergence.of(dict.fromkeys(same, cache(values[name])))
        yield Sensitivity(name, weight.numel(), found)


def keep_at_int8(layers: Sequence[Sensitivity], room: float) -> list[str]:
    """Choose the layers to keep at 8 bits: those that lose most per byte, within a budget.

    Args:
        layers: All layers.
        room: Extra bytes allowed.
    """
    kept = []
    for layer in by_loss_per_byte(layers):
        if layer.extra_bytes <= room:
            room -= layer.extra_bytes
            kept.append(layer.name)
    return sorted(kept)


def by_loss_per_byte(layers: Sequence[Sensitivity]) -> list[Sensitivity]:
    """Layers in the order in which 8 bits gain most for each byte they cost."""
    return sorted(layers, key=lambda layer: -layer.divergence / layer.extra_bytes)
