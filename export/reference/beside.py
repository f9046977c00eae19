"""The eager reference model of a bundle's composition: low-rank terms beside a frozen base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from caliport.calibrate.low_rank import LowRankUpdate
from caliport.export.decoder.terms import Composed, read_updates, split
from caliport.export.quantization.choices import Form, Quantization
from caliport.export.quantization.tensors import KnownIntegers, quantized
from caliport.export.reference import folded
from caliport.export.runtime import Rounding, get

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def reference(
    base: str | Path,
    adapter: Path | None,
    how: Quantization,
    runtime: str,
    shared: Mapping[str, Path] | None = None,
    rounding: Rounding | None = None,
    known: KnownIntegers | None = None,
) -> PreTrainedModel:
    """The eager model whose logits a bundle's composition should reproduce.

    Only the base is quantized, its activations rounded as the runtime rounds them; the low-rank
    terms are added to the outputs of its layers, not to their weights.

    Args:
        base: A Hugging Face directory or hub name.
        adapter: The composition's PEFT LoRA directory; None for the bundle's base.
        how: How the base is quantized.
        runtime: Name of the runtime.
        shared: The bundle's shared adapters, PEFT LoRA directories by name.
        rounding: How the base's activations are rounded; default as the runtime does.
        known: Integers to take in place of quantizing, as those that an artifact holds.

    Raises:
        InputError: A base or adapter that cannot be read, or an adapter that does not fit the base.
    """
    model = folded.reference(base, None, how, runtime, rounding, known)
    if adapter is None:
        return model
    updates = read_updates(base, {**(shared or {}), "": adapter})
    update = updates.pop("")
    form = get(runtime).adapter_form(how.precision)
    return beside(model, split(update, updates), updates, form)


def beside(
    model: PreTrainedModel,
    composed: Composed,
    adapters: Mapping[str, LowRankUpdate],
    form: Form | None = None,
) -> PreTrainedModel:
    """Make an eager model's layers compute W0·x plus a composition's terms, in place.

    Args:
        model: A model in any precision; its weights are not changed.
        composed: The terms.
        adapters: The shared adapters by name.
        form: How the shared adapters and their inputs are rounded; the composition's own matrices
            are then float16, as in a ``.pte`` (``caliport.export.executorch.bundle``). None for
            float32.

    Returns:
        ``model``.
    """
    from caliport.export.decoder.terms import halves

    shared = [adapters[name] for name in composed.adapters]
    own = composed.own
    for name in dict.fromkeys(n for u in (*shared, own) if u is not None for n in u.modules):
        parent, _, last = name.rpartition(".")
        layer = _Beside(
            model.get_submodule(name),
            [_linear(update.a[name], form) for update in shared],
            [_linear(update.b[name], form) for update in shared],
            composed.weight**2,
        )
        if own is not None and name in own.modules:
            pair = own.a[name], own.b[name]
            a, b = pair if form is None else halves(*pair)
            layer.own = nn.Sequential(_linear(a.float(), None), _linear(b.float(), None))
        setattr(model.get_submodule(parent), last, layer)
    return model


def _linear(matrix: Tensor, form: Form | None) -> nn.Linear:
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    weight = matrix if form is None else quantized(matrix, form)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class _Beside(nn.Module):
    """A layer of a base with low-rank terms beside it; all read the same input."""

    def __init__(
        self, layer: nn.Module, a: Sequence[nn.Linear], b: Sequence[nn.Linear], factor: float
    ) -> None:
        super().__init__()
        self.layer, self.a, self.b = layer, nn.ModuleList(a), nn.ModuleList(b)
        self.factor = factor
        self.own: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        if self.a:
            inner = torch.stack([a(x) for a in self.a]).sum(0)
            outer = torch.stack([b(inner) for b in self.b]).sum(0)
            output = output + outer * self.factor
        if self.own is not None:
            output = output + self.own(x)
        return output
