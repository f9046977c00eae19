"""Measure how much each linear layer loses at 4 bits, and choose which to keep at 8.

One layer at a time gets the values that int4 ships while all others stay float, and the next-token
distributions are compared with the float model's. Layers are then kept at 8 bits in order of loss
per byte that keeping them costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from caliport.core.errors import InputError
from caliport.export.quantization.tensors import plan, rounded

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


def sensitivities(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    on_layer: Callable[[str], None] = lambda name: None,
) -> list[Sensitivity]:
    """Measure every linear layer that int4 would ship in 4 bits.

    Args:
        model: A float32 decoder; restored afterwards.
        prompts: Token ids, such as prompts with their answers.
        on_layer: Called with each layer's name before it is measured.

    Returns:
        The layers, the most sensitive first.

    Raises:
        InputError: No prompts.
    """
    if not any(len(prompt) for prompt in prompts):
        raise InputError("sensitivity: found no prompts, expected at least one")
    before = [_log_probabilities(model, prompt) for prompt in prompts]
    found = []
    for name, form in plan(model, "int4").items():
        if form != "int4":
            continue
        on_layer(name)
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        kept = module.weight
        module.weight = nn.Parameter(rounded(kept.detach(), form), requires_grad=False)
        try:
            total = sum(
                float(
                    nn.functional.kl_div(
                        _log_probabilities(model, p), b, log_target=True, reduction="sum"
                    )
                )
                for p, b in zip(prompts, before, strict=True)
            )
        finally:
            module.weight = kept
        tokens = sum(len(prompt) for prompt in prompts)
        found.append(Sensitivity(name, kept.numel(), total / tokens))
    return sorted(found, key=lambda layer: -layer.divergence)


def _log_probabilities(model: PreTrainedModel, prompt: Sequence[int]) -> Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([list(prompt)]), use_cache=False).logits[0]
    return nn.functional.log_softmax(logits.float(), dim=-1)


def keep_at_int8(layers: Sequence[Sensitivity], share: float) -> list[str]:
    """Choose the layers to keep at 8 bits: those that lose most per byte, within a budget.

    Args:
        layers: All layers.
        share: Extra bytes allowed, as a share of the bytes of all layers at 4 bits.

    Raises:
        InputError: ``share`` is below 0.
    """
    if share < 0:
        raise InputError(f"share: found {share}, expected 0 or more")
    room = share * sum(layer.values / 2 for layer in layers)
    kept = []
    for layer in sorted(layers, key=lambda layer: -layer.divergence / layer.extra_bytes):
        if layer.extra_bytes <= room:
            room -= layer.extra_bytes
            kept.append(layer.name)
    return sorted(kept)
