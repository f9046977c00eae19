"""The error budget: accuracy loss at each stage between the adapters and the artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from caliport.validation.evaluation import quality
from caliport.validation.evaluation.evaluation import Answers, Evaluation, texts_of
from caliport.validation.evaluation.measures import compare, kl_divergence
from caliport.validation.records.budget import Budget, BudgetStage, StageName

_SMALLEST = 1e-30


@dataclass(frozen=True)
class StageAnswers:
    """The answers of one stage's model, and a label of it for people."""

    stage: StageName
    label: str
    answers: Answers


def measured(
    evaluation: Evaluation,
    stages: Sequence[StageAnswers],
    metric: str,
    *,
    before: Answers | None = None,
    first: Sequence[np.ndarray] | None = None,
    form: str = "",
) -> tuple[BudgetStage, ...]:
    """Measure each stage against the one before it and against the first of the budget.

    Args:
        evaluation: What every model was asked.
        stages: In their order.
        metric: Task metric, where the evaluation has references.
        before: Answers of the stage before ``stages``; None where they begin the budget.
        first: Logits of the budget's first stage; None for those of the first of ``stages``.
        form: Of the artifact that they belong to; empty for stages that all forms share.
    """
    found = []
    for given in stages:
        logits, targets = given.answers.logits, evaluation.targets
        origin = logits if first is None else first
        from_first = compare(origin, logits, targets)
        stage = BudgetStage(
            stage=given.stage,
            label=given.label,
            form=form,
            perplexity=from_first.perplexity,
            task=_task(evaluation, given.answers, metric),
        )
        if before is not None:
            stage = stage.model_copy(
                update={
                    "previous": compare(before.logits, logits, targets),
                    "first": from_first,
                    "by_position": kl_by_position(before.logits, logits),
                    "by_layer": distance_by_layer(before.streams, given.answers.streams),
                }
            )
        found.append(stage)
        before, first = given.answers, origin
    return tuple(found)


def with_stage(budget: Budget, stage: BudgetStage) -> Budget:
    """The budget with one more stage after the others of its form, such as a device's.

    A stage of the same name and form that is there already is replaced.
    """
    kept = [s for s in budget.stages if (s.stage, s.form) != (stage.stage, stage.form)]
    place = max((i for i, s in enumerate(kept, start=1) if s.form == stage.form), default=len(kept))
    return budget.model_copy(update={"stages": (*kept[:place], stage, *kept[place:])})


def kl_by_position(
    reference: Sequence[np.ndarray], found: Sequence[np.ndarray]
) -> tuple[float, ...]:
    """Mean KL in nats over the prompts whose answer reaches a position, for each position.

    Args:
        reference: For each prompt, logits [n, vocab].
        found: The same shapes.

    Returns:
        As many values as the longest answer has positions.
    """
    rows = [kl_divergence(p, q) for p, q in zip(reference, found, strict=True)]
    longest = max(map(len, rows))
    return tuple(float(np.mean([r[i] for r in rows if len(r) > i])) for i in range(longest))


def distance_by_layer(
    reference: Sequence[np.ndarray] | None, found: Sequence[np.ndarray] | None
) -> tuple[float, ...]:
    """Mean of ‖found − reference‖ / ‖reference‖ over all positions, for each residual stream.

    Args:
        reference: For each prompt, residual streams [layers + 1, n, hidden]; None: not read.
        found: The same shapes, or None.

    Returns:
        One value after the embedding and after each layer; empty where one of the two is None.
    """
    if reference is None or found is None:
        return ()
    parts = [
        np.linalg.norm(q - p, axis=-1) / np.maximum(np.linalg.norm(p, axis=-1), _SMALLEST)
        for p, q in zip(reference, found, strict=True)
    ]
    return tuple(np.concatenate(parts, axis=1).mean(axis=1, dtype=np.float64).tolist())


def _task(evaluation: Evaluation, answers: Answers, metric: str) -> float | None:
    """Mean of the task metric; None without references or without text."""
    if evaluation.references is None or answers.generated is None:
        return None
    texts = texts_of(evaluation, answers)
    return float(np.mean(quality.metric(metric, texts, evaluation.references)))
