"""Fold an adapter into a base's weights: W = W0 + ΔW, and what else the adapter changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from caliport.calibrate.adapter import Adapter
from caliport.calibrate.low_rank import LowRankUpdate


def fold(
    model: PreTrainedModel, adapter: LowRankUpdate | Adapter, source: str | Path
) -> PreTrainedModel:
    """Change every weight that an adapter changes, in place.

    The sum is computed in float32 and rounded once to the weight's type. A weight shared with
    other modules (a head tied to the embedding) is untied first, since only the adapter's module
    may change; the model's config is updated accordingly.

    Args:
        model: The base, unquantized.
        adapter: What to add or replace.
        source: Names the adapter in errors.

    Raises:
        InputError: The adapter has modules or shapes that the base does not have, or was saved
            with other weights of the base.
    """
    if isinstance(adapter, LowRankUpdate):
        adapter = Adapter(adapter)
    adapter = adapter.fitted(model, source).check_saved(model.get_parameter, source)
    untie(model, adapter)
    with torch.no_grad():
        for name in sorted(adapter.parameters):
            module = model.get_submodule(name.rpartition(".")[0])
            parameter = model.get_parameter(name)
            changed = Folded.of(adapter, module, name, parameter.cpu())
            parameter.copy_(changed.rows(0, len(changed.value)))
    return model


def load_folded(base: str | Path, adapter: Path | None) -> PreTrainedModel:
    """A base in float32 with an adapter folded in, if there is one.

    Raises:
        InputError: A base or adapter that cannot be read, or an adapter that does not fit.
    """
    from caliport.calibrate.peft_files import read_adapter
    from caliport.core.checkpoints import load_base

    changes = None if adapter is None else read_adapter(adapter)
    model = load_base(base)
    return model if changes is None or adapter is None else fold(model, changes, adapter)


def untie(model: PreTrainedModel, adapter: Adapter) -> None:
    """Give parameters that an adapter changes a tensor of their own, if they share one.

    They stay untied even after saving and loading. A decoder on the ``meta`` device keeps
    ``all_tied_weights_keys``, which say where its checkpoint has them.
    """
    owners = Counter(
        id(parameter) for module in model.modules() for parameter in module._parameters.values()
    )
    for name in sorted(adapter.parameters):
        parameter = model.get_parameter(name)
        if owners[id(parameter)] < 2:
            continue
        owners[id(parameter)] -= 1
        parent, _, key = name.rpartition(".")
        own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        setattr(model.get_submodule(parent), key, own)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        tied = {} if parameter.is_meta else model.all_tied_weights_keys
        for one in [one for one, other in tied.items() if name in (one, other)]:
            del tied[one]


@dataclass(frozen=True)
class Folded:
    """One parameter as an adapter changes it, computed in slices of rows.

    Attributes:
        value: The base's, or what replaces it.
        delta: What is added to it, of the same shape; None for nothing.
        factor: What the sum is multiplied with, [rows, 1] or [1, columns]; None for nothing.
    """

    value: Tensor
    delta: Tensor | None = None
    factor: Tensor | None = None

    @classmethod
    def of(cls, adapter: Adapter | None, module: nn.Module, name: str, value: Tensor) -> Folded:
        """A parameter of a module, with its full name and the base's values."""
        if adapter is None or name not in adapter.parameters:
            return cls(value)
        parent, _, key = name.rpartition(".")
        value = adapter.replaced.get(name, value)
        if key == "bias":
            return cls(value, adapter.biases.get(parent))
        # Conv1D (GPT-2) stores its weight as [in, out], and so does an embedding.
        transposed = isinstance(module, Conv1D)
        if parent in adapter.embeddings.a:
            delta, transposed = adapter.embeddings.delta(parent), True
        elif parent in adapter.update.a:
            delta = adapter.update.delta(parent)
            delta = delta.T if transposed else delta
        else:
            return cls(value)
        magnitude = adapter.magnitudes.get(parent)
        if magnitude is None:
            return cls(value, delta)
        norm = torch.linalg.norm(value.float() + delta, dim=0 if transposed else 1)
        return cls(value, delta, (magnitude / norm).unsqueeze(0 if transposed else 1))

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` in float32."""
        part = self.value[start:stop].float()
        if self.delta is not None:
            part = part + self.delta[start:stop]
        if self.factor is not None:
            part = part * (self.factor if len(self.factor) == 1 else self.factor[start:stop])
        return part
