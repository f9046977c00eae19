"""Fold a low-rank update into a base's weights: W = W0 + ΔW."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from calibrate.low_rank import LowRankUpdate


def fold(model: PreTrainedModel, update: LowRankUpdate, source: str | Path) -> PreTrainedModel:
    """Add ΔW to the weight of every updated module, in place.

    The sum is taken in float32 and rounded once to the weight's own type.

    Args:
        model: The base, unquantized.
        update: What to add.
        source: Names the adapter in errors.

    Raises:
        InputError: The update has modules or shapes that the base has not.
    """
    update.check_fits(model, source)
    with torch.no_grad():
        for name in update.modules:
            weight = model.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            weight.copy_(weight.float() + update.delta(name))
    return model
