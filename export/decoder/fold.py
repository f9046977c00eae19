"""Fold a low-rank update into a base's weights: W = W0 + ΔW."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from caliport.calibrate.low_rank import LowRankUpdate


def fold(model: PreTrainedModel, update: LowRankUpdate, source: str | Path) -> PreTrainedModel:
    """Add ΔW to the weight of every updated module, in place.

    The sum is computed in float32 and rounded once to the weight's type. A weight shared with
    other modules (a head tied to the embedding) is untied first, since only the updated module
    may change; the model's config is updated accordingly.

    Args:
        model: The base, unquantized.
        update: The update ΔW to add.
        source: Names the adapter in errors.

    Raises:
        InputError: The update has modules or shapes that the base does not have.
    """
    update.check_fits(model, source)
    untie(model, update)
    with torch.no_grad():
        for name in update.modules:
            module = model.get_submodule(name)
            assert isinstance(module.weight, nn.Parameter)
            weight, delta = module.weight, update.delta(name)
            # Conv1D (GPT-2) stores its weight as [in, out].
            delta = delta.T if isinstance(module, Conv1D) else delta
            weight.copy_(weight.float() + delta.to(weight.device))
    return model


def untie(model: PreTrainedModel, update: LowRankUpdate) -> None:
    """Give each updated module a weight of its own, in place, on any device.

    It stays untied after saving and loading. A plan of forms is made after this, since an untied
    head and its embedding ship in forms of their own.
    """
    owners = Counter(
        id(parameter) for module in model.modules() for parameter in module._parameters.values()
    )
    for name in update.modules:
        module = model.get_submodule(name)
        assert isinstance(module.weight, nn.Parameter)
        if owners[id(module.weight)] < 2:
            continue
        module.weight = nn.Parameter(module.weight.clone(), module.weight.requires_grad)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        model.all_tied_weights_keys.pop(f"{name}.weight", None)
