"""Single-task and joint-expert LoRA adapters, trained with PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from caliport.calibrate.low_rank import LowRankUpdate, targeted
from caliport.calibrate.training.batches import Encoded
from caliport.calibrate.training.loop import TrainRun, fit

COMPONENTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """A plain LoRA. The paper (arXiv 2507.16083) uses r = 32, α = 16, dropout 0.05.

    Attributes:
        rank: r.
        alpha: α; the update is scaled by α/r.
        dropout: Dropout probability of the adapter's input during training.
        target_modules: Last part of the names of the linear layers to adapt.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    target_modules: tuple[str, ...] = COMPONENTS


def train_lora(
    model: PreTrainedModel,
    examples: Sequence[Encoded],
    lora: LoraSettings,
    run: TrainRun,
) -> tuple[LowRankUpdate, list[dict[str, float]]]:
    """Train one LoRA on a frozen base.

    Afterwards the model has no adapter and all its weights are unchanged.

    Args:
        model: The base.
        examples: Examples of one task; of the composition for the joint expert.
        lora: Shape of the adapter.
        run: Settings, title, checkpoint and micro-batch.

    Returns:
        The adapter, and its loss curve.

    Raises:
        InputError: ``lora.target_modules`` name no linear layer of the base, or the training failed
            (``caliport.calibrate.training.loop.fit``).
    """
    targeted(model, lora.target_modules)
    torch.manual_seed(run.settings.seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT multiplies; any number is right
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    peft_model.train()
    try:
        curve = fit(model, peft_model, examples, run)
        update = _update_of(peft_model, lora)
    finally:
        peft_model.eval()
        peft_model.unload()
        model.requires_grad_(True)
    return update, curve


def _update_of(peft_model: torch.nn.Module, lora: LoraSettings) -> LowRankUpdate:
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(peft_model)
    sides: dict[str, dict[str, torch.Tensor]] = {"A": {}, "B": {}}
    for key, tensor in state.items():
        name, _, side = key.removesuffix(".weight").rpartition(".lora_")
        sides[side][name.removeprefix("base_model.model.")] = tensor.detach().clone()
    scaled = {name: b * (lora.alpha / lora.rank) for name, b in sides["B"].items()}
    return LowRankUpdate(sides["A"], scaled)
