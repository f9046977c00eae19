"""Train a correction on top of frozen adapters and give back one update a composition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from caliport.calibrate.corrections.common import Composition, frozen
from caliport.calibrate.corrections.registry import CORRECTIONS
from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.training.attach import Rounding, Rows, attached, attached_rounded
from caliport.calibrate.training.batches import Encoded
from caliport.calibrate.training.loop import TrainSettings, fit


@dataclass(frozen=True)
class Calibrated:
    """What a calibration gives.

    Attributes:
        updates: By composition, the merge plus its correction as one update.
        parameters: Number of trained values, all compositions together.
        curve: Loss while training, see ``caliport.calibrate.training.loop.fit``.
    """

    updates: dict[str, LowRankUpdate]
    parameters: int
    curve: list[dict[str, float]]


def calibrate(
    model: PreTrainedModel,
    compositions: Mapping[str, Composition],
    method: str,
    examples: Mapping[str, Sequence[Encoded]],
    settings: TrainSettings,
    title: str,
    *,
    per_layer: bool = False,
    rounding: Rounding | None = None,
    micro_batch: int | None = None,
    resume: Path | None = None,
) -> Calibrated:
    """Learnable Calibration (``lc``, Eq. 6), LC++ (``lc++``, Eq. 7) or column scales (``scales``).

    Only the correction has gradients; the base and the adapters stay as they are, bit by bit.
    With several compositions one correction is trained for all of them (the paper's "shared"
    rows), on their examples in one mixture; each row of a batch uses its own composition's merge.

    Args:
        model: The base, computing as it will ship: with ``rounding`` its other layers should
            hold the values that ship for them.
        compositions: By name what to correct; as a rule one.
        method: A key of ``caliport.calibrate.corrections.registry.CORRECTIONS``.
        examples: By composition, examples of it.
        settings: How to train; the paper uses Adam, 5e-4, one pass over 10,000 examples.
        title: For the progress bar and errors.
        per_layer: A correction for every layer instead of one shared by all.
        rounding: Quantization-aware calibration of folded weights: Q of Q(W0 + ΔW), with a
            straight-through gradient. For weights that ship apart from ΔW, give a model whose
            weights are quantized already, and no rounding.
        micro_batch: Most examples in one forward pass; gradients of the rest are accumulated.
        resume: Checkpoint file, see ``caliport.calibrate.training.loop.fit``.
    """
    for name, composition in compositions.items():
        composition.merged.check_fits(model, name)
    torch.manual_seed(settings.seed)
    correction = CORRECTIONS[method](compositions, per_layer)
    modules = sorted({m for c in compositions.values() for u in _parts(c) for m in u.modules})
    rows = Rows([name for name in compositions for _ in examples[name]])

    def terms(module: str) -> list[Any]:
        return [(index, *correction.factors(name, module)) for name, index in rows.groups]

    attach = (
        attached(model, modules, terms)
        if rounding is None
        else attached_rounded(model, modules, terms, rounding)
    )
    pooled = [example for name in compositions for example in examples[name]]
    model.eval().requires_grad_(False)
    try:
        with attach:
            curve = fit(
                model, correction, pooled, settings, title, resume, rows, micro_batch=micro_batch
            )
    finally:
        model.requires_grad_(True)
    return Calibrated(
        {name: frozen(correction, name, c) for name, c in compositions.items()},
        sum(p.numel() for p in correction.parameters() if p.requires_grad),
        curve,
    )


def _parts(composition: Composition) -> tuple[LowRankUpdate, ...]:
    return composition.merged, *composition.updates.values()
