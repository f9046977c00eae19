"""One training loop for the base, adapters and corrections."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, get_scheduler

from calibrate.batches import IGNORED, Batch, Encoded, Order, collate
from caliport_core.errors import InputError
from caliport_core.progress import progress

_CHECKPOINT_SECONDS = 30.0
_POINTS = 200


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Adam, gradients clipped to norm 1, linear warm-up, then the schedule.

    Attributes:
        steps: Optimizer steps.
        batch_size: Examples a step.
        learning_rate: At its highest.
        schedule: A transformers scheduler: ``constant_with_warmup``, ``linear`` or ``cosine``.
        warmup: Share of the steps.
        seed: Of the order of examples, of dropout and of initial values.
        prompt_loss: Train on the prompt's tokens too, as in pre-training.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    seed: int = 0
    prompt_loss: bool = False


def loss_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats of the batch's targets."""
    kept = batch.labels.shape[1]
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=kept + 1,
        use_cache=False,
    ).logits
    predicted = logits[:, -kept - 1 : -1] if logits.shape[1] > kept else logits[:, :-1]
    labels = batch.labels[:, -predicted.shape[1] :]
    return functional.cross_entropy(
        predicted.reshape(-1, predicted.shape[-1]).float(),
        labels.reshape(-1),
        ignore_index=IGNORED,
    )


def fit(
    model: PreTrainedModel,
    trained: nn.Module,
    examples: Sequence[Encoded],
    settings: TrainSettings,
    title: str,
    resume: Path | None = None,
) -> list[dict[str, float]]:
    """Train ``trained``'s parameters that require gradients on the model's loss.

    Args:
        model: Computes the loss; whatever is to be trained is part of it or attached to it.
        trained: Holds the parameters to train; saved and restored on resume.
        examples: What to train on.
        settings: How.
        title: For the progress bar and errors.
        resume: A file for checkpoints. One that is there is continued from, with the same
            result as an uninterrupted run; it is the caller's to remove when all is done.

    Returns:
        The loss curve: up to 200 points of ``step`` and mean ``loss`` since the one before.

    Raises:
        InputError: The loss is not finite; names the step.
    """
    parameters = {n: p for n, p in trained.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(parameters.values(), lr=settings.learning_rate)
    scheduler = get_scheduler(
        settings.schedule, optimizer, int(settings.steps * settings.warmup), settings.steps
    )
    lengths = [len(e.prompt) + len(e.target) for e in examples]
    order = Order(lengths, settings.batch_size, settings.seed)
    torch.manual_seed(settings.seed)
    start, curve, recent = 0, [], []
    if resume is not None and resume.is_file():
        state = torch.load(resume, weights_only=True)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state["parameters"][name])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        start, curve, recent = state["step"], state["curve"], state["recent"]
    pad = model.config.pad_token_id or 0
    every = max(1, settings.steps // _POINTS)
    saved = time.monotonic()
    with progress(title, settings.steps) as advance:
        for step in range(start, settings.steps):
            batch = collate([examples[i] for i in order[step]], pad, settings.prompt_loss)
            loss = loss_of(model, batch)
            value = loss.item()
            if not torch.isfinite(loss):
                raise InputError(
                    f"{title}: loss is {value} at step {step}; lower the learning rate"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            scheduler.step()
            recent.append(value)
            if (step + 1) % every == 0 or step + 1 == settings.steps:
                curve.append({"step": step + 1, "loss": sum(recent) / len(recent)})
                recent = []
            advance(step + 1, f"loss {value:.3f}")
            if resume is not None and time.monotonic() - saved > _CHECKPOINT_SECONDS:
                _save(resume, step + 1, parameters, optimizer, scheduler, curve, recent)
                saved = time.monotonic()
    return curve


def _save(
    path: Path,
    step: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    curve: list[dict[str, float]],
    recent: list[float],
) -> None:
    """Write a checkpoint beside and rename, so that a kill leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "parameters": {name: p.detach() for name, p in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": torch.get_rng_state(),
        "curve": curve,
        "recent": recent,
    }
    beside = path.with_suffix(".new")
    torch.save(state, beside)
    os.replace(beside, path)
