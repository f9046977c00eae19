"""Train a correction on top of a frozen merge and give back one update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from calibrate.batches import Encoded
from calibrate.correction import LC, LCPlusPlus, attached, components, corrected, frozen
from calibrate.low_rank import LowRankUpdate
from calibrate.train import TrainSettings, fit

CORRECTIONS: Mapping[str, Callable[[Mapping[str, tuple[int, int]]], nn.Module]] = {
    "lc": LC,
    "lc++": LCPlusPlus,
}


def calibrate(
    model: PreTrainedModel,
    merged: LowRankUpdate,
    method: str,
    examples: Sequence[Encoded],
    settings: TrainSettings,
    title: str,
    resume: Path | None = None,
) -> tuple[LowRankUpdate, int, list[dict[str, float]]]:
    """Learnable Calibration (``lc``, Eq. 6) or LC++ (``lc++``, Eq. 7) of a merge.

    Only the correction has gradients; the base and the merge stay as they are.

    Args:
        model: The base.
        merged: The merge underneath, as a rule ``calibrate.merge.linear``.
        method: A key of ``CORRECTIONS``.
        examples: Compositional examples.
        settings: How to train; the paper uses Adam, 5e-4, one pass over 10,000 examples.
        title: For the progress bar and errors.
        resume: Checkpoint file, see ``calibrate.train.fit``.

    Returns:
        Merge plus correction as one update, the number of trained values, and the loss curve.
    """
    merged.check_fits(model, title)
    torch.manual_seed(settings.seed)
    correction = CORRECTIONS[method](components(merged))
    model.eval().requires_grad_(False)
    try:
        with attached(model, merged.modules, corrected(merged, correction)):  # type: ignore[arg-type]
            curve = fit(model, correction, examples, settings, title, resume)
    finally:
        model.requires_grad_(True)
    count = sum(p.numel() for p in correction.parameters())
    return frozen(merged, correction), count, curve  # type: ignore[arg-type]
