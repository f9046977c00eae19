"""Compare one artifact of ours with eager models: the check behind recipes and flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from caliport.export import runtime as runtimes
from caliport.validation.references import FP32, EagerReferences

if TYPE_CHECKING:
    import numpy as np

    from caliport.validation.evaluation.evaluation import Answers
    from caliport.validation.gates.criteria import Caption
    from caliport.validation.records.budget import Budget, BudgetStage
    from caliport.validation.records.reports import ArtifactResult
    from caliport.validation.runners.open import Execution


def check_artifact(
    execution: Execution,
    references: EagerReferences,
    caption: Caption,
    *,
    metric: str,
    limits: Mapping[str, float],
    first: Sequence[np.ndarray] | None = None,
) -> tuple[ArtifactResult, tuple[BudgetStage, ...]]:
    """Validate one artifact, or one part of a bundle, against its eager references.

    Args:
        execution: The artifact and how to run it.
        references: Of its composition.
        caption: How the report shows it.
        metric: Task metric, where there are reference texts.
        limits: Of its precision, where they are not the default.
        first: Logits of the first stage of the error budget; None for the fp32 composition.

    Returns:
        The verdict, and the stages that it adds to the error budget: the eager model in its own
        precision and, where its logits are finite, the artifact; none for a base alone.

    Raises:
        InputError: See ``caliport.validation.gates.verdict.validate_artifact``.
    """
    from caliport.validation.evaluation.budget import StageAnswers, measured
    from caliport.validation.gates.criteria import Criteria
    from caliport.validation.gates.limits import limits_for
    from caliport.validation.gates.verdict import validate_artifact
    from caliport.validation.runners import engine

    artifact = execution.artifact
    alone = references.adapter is None
    in_float = (
        engine.get(artifact.runtime).runs_in_float
        and artifact.precision != FP32.precision
        and not artifact.is_bundle
    )
    quantized = references.expected(artifact)
    fp32 = references.answers(FP32)
    criteria = Criteria(
        references.evaluation,
        fp32,
        None if alone else references.answers(FP32, alone=True),
        limits_for(artifact.precision, **limits),
        metric,
    )
    answered: list[Answers] = []
    result = validate_artifact(
        execution,
        criteria,
        quantized,
        caption,
        graph=references.graph(artifact) if in_float else None,
        source=references.source,
        answered=answered.append,
    )
    if alone:
        return result, ()
    label = artifact.precision
    if artifact.precision != FP32.precision:
        label += f", as {runtimes.get(artifact.runtime).title} rounds"
    stages = [StageAnswers("quantized eager", label, quantized.said.answers)]
    stages += [
        StageAnswers("artifact", f"{artifact.precision} in {answers.name}", answers)
        for answers in answered
    ]
    return result, measured(
        references.evaluation,
        stages,
        metric,
        before=fp32,
        first=fp32.logits if first is None else first,
        form=artifact.form,
    )


def budget_of(
    composition: str, references: EagerReferences, label: str, stages: Sequence[BudgetStage]
) -> Budget:
    """The error budget from calibration on, where the single-task adapters are not known.

    Args:
        composition: Its name in the report.
        references: Of the composition.
        label: What people call the composed adapter that ships.
        stages: What ``check_artifact`` adds.
    """
    from caliport.validation.evaluation.budget import StageAnswers, measured
    from caliport.validation.gates.criteria import METRIC
    from caliport.validation.records.budget import Budget

    evaluation = references.evaluation
    ships = StageAnswers("calibration", label, references.answers(FP32))
    shared = measured(evaluation, [ships], METRIC)
    metric = None if evaluation.references is None else METRIC
    return Budget(composition=composition, metric=metric, stages=(*shared, *stages))
