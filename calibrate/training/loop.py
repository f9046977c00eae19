"""The training loop of bases, adapters and corrections, on one process or several."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from caliport.calibrate.training.batches import (
    IGNORED,
    Batch,
    Encoded,
    Order,
    collate,
    target_count,
)
from caliport.calibrate.training.checkpoint import State
from caliport.calibrate.training.processes import (
    accelerated,
    on_device,
    random_state,
    same_start,
    stoppable,
    summed,
)
from caliport.core.errors import Diverged
from caliport.core.progress import progress

if TYPE_CHECKING:
    from accelerate import Accelerator

_CHECKPOINT_SECONDS = 30.0
_SHOWN_EXAMPLES = 8

OnBatch = Callable[[Sequence[int], int], None]
"""Called before each forward pass with the rows' indices into the examples, and the step."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train: Adam, gradients clipped to norm 1, linear warm-up, then the schedule.

    Attributes:
        steps: Optimizer steps.
        batch_size: Examples per step.
        learning_rate: Peak learning rate.
        schedule: A transformers scheduler: ``constant_with_warmup``, ``linear`` or ``cosine``.
        warmup: Share of the steps used for warm-up, 0 to 1.
        seed: For the order of examples, dropout and initial values.
        prompt_loss: Train on the prompt's tokens too, as in pre-training.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    seed: int = 0
    prompt_loss: bool = False


@dataclass(frozen=True)
class TrainRun:
    """One training: its settings, and what does not change its result.

    Attributes:
        settings: How to train.
        title: For the progress bar and errors.
        resume: Checkpoint file that all processes can read; None: no checkpoints. If it exists,
            training continues from it, with the same result as an uninterrupted run. An interrupt
            (SIGINT, SIGTERM) writes one. The caller removes it when all is done.
        micro_batch: Most examples in one forward pass; gradients of a larger batch are accumulated.
    """

    settings: TrainSettings
    title: str
    resume: Path | None = None
    micro_batch: int | None = None


def losses_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Cross-entropy in nats of every target, [batch, kept]; 0 where there is no target."""
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
        reduction="none",
    ).view(labels.shape)


def loss_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats of the batch's targets."""
    return losses_of(model, batch).sum() / (batch.labels != IGNORED).sum()


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    examples: Sequence[Encoded],
    batch_size: int = 64,
) -> list[float]:
    """Each example's mean loss in nats a target token, in eval mode and fp32.

    Runs on the device that ``fit`` uses and moves the model back afterwards. Processes share
    nothing: each one that calls this computes all the losses.

    Args:
        model: The model, with whatever is attached to it.
        examples: What to measure.
        batch_size: Examples in one forward pass; changes rounding only.
    """
    pad = _pad(model)
    near = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt + examples[i].target))
    found = [0.0] * len(examples)
    training = model.training
    model.eval()
    try:
        with accelerated() as accelerator, on_device(accelerator.device, model):
            for start in range(0, len(near), batch_size):
                rows = near[start : start + batch_size]
                batch = collate([examples[i] for i in rows], pad).to(accelerator.device)
                sums = losses_of(model, batch).sum(dim=1).tolist()
                for index, loss in zip(rows, sums, strict=True):
                    found[index] = loss / max(1, target_count(examples[index]))
    finally:
        model.train(training)
    return found


def fit(
    model: PreTrainedModel,
    trained: nn.Module,
    examples: Sequence[Encoded],
    run: TrainRun,
    on_batch: OnBatch | None = None,
) -> list[dict[str, float]]:
    """Train the parameters of ``trained`` that require gradients on the model's loss.

    A step's loss is the mean over all targets of its batch, regardless of how many processes share
    the batch and how many forward passes it takes. Accelerate decides device, processes and
    precision: as its launcher was told, else a GPU in bf16 autocast if there is one, else fp32 on
    the CPU.

    Args:
        model: Computes the loss; what is trained is part of it or attached to it. It is moved back
            to its device afterwards, as is ``trained``.
        trained: Holds the parameters to train; saved and restored on resume.
        examples: What to train on; the same on all processes.
        run: Settings, title, checkpoint and micro-batch.
        on_batch: Called before each forward pass with the rows' indices into ``examples`` and the
            step.

    Returns:
        The loss curve: up to 200 points of ``step`` and mean ``loss`` since the point before.

    Raises:
        Diverged: The loss or the gradient is not finite; the message names the step and its
            examples. ``trained`` and, but for the first, ``run.resume`` then hold the state
            before that step.
        KeyboardInterrupt: SIGINT or SIGTERM came; the checkpoint has been written.
    """
    settings, title, resume = run.settings, run.title, run.resume
    with accelerated() as accelerator, on_device(accelerator.device, model, trained):
        state = State.new(
            trained,
            settings.learning_rate,
            settings.schedule,
            int(settings.steps * settings.warmup),
            settings.steps,
        )
        parameters = list(state.parameters.values())
        torch.manual_seed(settings.seed + accelerator.process_index)
        if resume is not None and resume.is_file():
            state.load(resume, accelerator, title)
        same_start(accelerator, parameters, state.step)
        lengths = [len(e.prompt) + len(e.target) for e in examples]
        order = Order(lengths, settings.batch_size, settings.seed)
        saved = time.monotonic()
        try:
            with stoppable(resume is not None) as stop, progress(title, settings.steps) as advance:
                for step in range(state.step, settings.steps):
                    before = random_state(accelerator.device)
                    batch = order[step]
                    loss = _backward(accelerator, model, examples, batch, step, run, on_batch)
                    due = time.monotonic() - saved > _CHECKPOINT_SECONDS
                    flags = [due and accelerator.is_main_process, stop.asked]
                    values = torch.cat([loss[None], loss.new_tensor(flags)])
                    value, save, stopping = summed(accelerator, parameters, values)
                    norm = nn.utils.clip_grad_norm_(parameters, 1.0).item()
                    if not (math.isfinite(value) and math.isfinite(norm)):
                        kept = resume if step else None  # nothing is lost at the start
                        if kept is not None:
                            state.save(kept, accelerator, before)
                        raise Diverged(_not_finite(run.title, value, norm, step, batch, kept))
                    state.advance(value)
                    advance(step + 1, f"loss {value:.3f}")
                    if resume is not None and (save or stopping):
                        state.save(resume, accelerator, random_state(accelerator.device))
                        saved = time.monotonic()
                    if stopping:
                        raise KeyboardInterrupt
        finally:
            state.optimizer.zero_grad(set_to_none=True)
    return state.curve


def _backward(
    accelerator: Accelerator,
    model: PreTrainedModel,
    examples: Sequence[Encoded],
    batch: Sequence[int],
    step: int,
    run: TrainRun,
    on_batch: OnBatch | None,
) -> Tensor:
    """Add the gradients of this process's share of a batch; return its part of the mean loss."""
    prompt_loss = run.settings.prompt_loss
    pad = _pad(model)
    targets = max(1, sum(target_count(examples[i], prompt_loss) for i in batch))
    mine = batch[accelerator.process_index :: accelerator.num_processes]
    size = run.micro_batch or len(batch)
    total = torch.zeros((), device=accelerator.device)
    for start in range(0, len(mine), size):
        rows = mine[start : start + size]
        if on_batch is not None:
            on_batch(rows, step)
        part = collate([examples[i] for i in rows], pad, prompt_loss).to(accelerator.device)
        with accelerator.autocast():
            loss = losses_of(model, part).sum() / targets
        loss.backward()
        total += loss.detach()
    return total


def _pad(model: PreTrainedModel) -> int:
    """A token to pad with; which one has no effect."""
    return getattr(model.config.get_text_config(), "pad_token_id", None) or 0


def _not_finite(
    title: str, loss: float, norm: float, step: int, batch: Sequence[int], state: Path | None
) -> str:
    shown = ", ".join(map(str, batch[:_SHOWN_EXAMPLES])) + ", …" * (len(batch) > _SHOWN_EXAMPLES)
    kept = "" if state is None else f"; the last good state is in {state}"
    return (
        f"{title}: loss is {loss}, gradient norm {norm} at step {step} (examples {shown}; "
        f"{len(batch)} in all, counted from 0){kept}; lower the learning rate or look at these "
        "examples"
    )
