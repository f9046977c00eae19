"""Train a correction on top of frozen adapters; return one update per composition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from caliport.calibrate.corrections.common import Composition, corrected_update
from caliport.calibrate.corrections.registry import CORRECTIONS
from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.training.attach import Rounding, Rows, attached, attached_rounded
from caliport.calibrate.training.batches import Encoded
from caliport.calibrate.training.loop import TrainRun, fit


@dataclass(frozen=True)
class Calibrated:
    """The result of a calibration.

    Attributes:
        updates: By composition, the merge plus its correction as one update.
        parameters: Number of trained values, all compositions together.
        curve: Training loss, see ``caliport.calibrate.training.loop.fit``.
    """

    updates: dict[str, LowRankUpdate]
    parameters: int
    curve: list[dict[str, float]]


def calibrate(
    model: PreTrainedModel,
    compositions: Mapping[str, Composition],
    method: str,
    examples: Mapping[str, Sequence[Encoded]],
    run: TrainRun,
    per_layer: bool = False,
    rounding: Rounding | None = None,
) -> Calibrated:
    """Train a correction: Learnable Calibration (``lc``), LC++ (``lc++``), ….

    Only the correction has gradients; the base and the adapters stay unchanged, bit by bit. With
    several compositions, one correction is trained for all of them (the paper's "shared" rows) on
    a mixture of their examples; each row of a batch uses its own composition's merge.

    Args:
        model: The base, computing as it will ship: with ``rounding``, layers that are not corrected
            should already hold the values that ship for them.
        compositions: What to correct, by name; usually one.
        method: A name in ``caliport.calibrate.corrections.registry.CORRECTIONS``.
        examples: Examples of each composition, by its name.
        run: Settings, title, checkpoint and micro-batch. The paper uses Adam at 5e-4 for one pass
            over 10,000 examples.
        per_layer: One correction for every layer instead of one shared by all.
        rounding: Q of quantization-aware calibration for folded weights, Q(W0 + ΔW), with a
            straight-through gradient. For weights that ship beside ΔW, pass a model with quantized
            weights and no rounding.

    Raises:
        InputError: A composition does not fit the model, or the training failed
            (``caliport.calibrate.training.loop.fit``).
    """
    for name, composition in compositions.items():
        composition.merged.check_fits(model, name)
    torch.manual_seed(run.settings.seed)
    correction = CORRECTIONS[method](compositions, per_layer)
    modules = sorted({m for c in compositions.values() for u in _parts(c) for m in u.modules})
    rows = Rows([name for name in compositions for _ in examples[name]])

    def terms(module: str) -> list[Any]:
        return [(index, *correction.factors(name, module)) for name, index in rows.groups]

    attach = (
        attached(model, modules, terms)
        if rounding is None
        else attached_rounded(model, modules, terms, rounding, keep=run.micro_batch is not None)
    )
    pooled = [example for name in compositions for example in examples[name]]
    model.eval().requires_grad_(False)
    try:
        with attach:
            curve = fit(model, correction, pooled, run, rows)
    finally:
        model.requires_grad_(True)
    return Calibrated(
        {name: corrected_update(correction, name, c) for name, c in compositions.items()},
        sum(p.numel() for p in correction.parameters() if p.requires_grad),
        curve,
    )


def _parts(composition: Composition) -> tuple[LowRankUpdate, ...]:
    return composition.merged, *composition.updates.values()
