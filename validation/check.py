"""XXX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from caliport.core.directories import read_manifest
from caliport.export.quantization.choices import Quantization
from caliport.validation.artifact import form_of
from caliport.validation.references import References

if TYPE_CHECKING:
    import numpy as np

    from caliport.validation.evaluation.evaluation import Answers
    from caliport.validation.records.budget import Budget, BudgetStage
    from caliport.validation.records.reports import ArtifactResult


METRIC = "rougeL"
"""Task metric where no recipe says one."""


def check_artifact(
    directory: Path,
    references: References,
    *,
    composition: str,
    method: str,
    metric: str,
    threads: int,
    limits: dict[str, float],
    bundled: str | None = None,
    runner: str = "plain",
    notes: Sequence[str] = (),
    first: Sequence[np.ndarray] | None = None,
) -> tuple[ArtifactResult, tuple[BudgetStage, ...]]:
    """Hold one artifact, or part of a bundle, against its references, for recipes and for flags.

    Args:
        directory: The artifact.
        references: Of its composition.
        composition: Its name in the report.
        method: The method that made it, for the report.
        metric: Task metric, where there are references.
        threads: Of the runtime.
        limits: Of its precision, where they are not the default.
        bundled: Of a bundle, the composition to check; None for its base alone.
        runner: What runs it: a word of ``caliport.validation.runners.open.open_runner``.
        notes: What is known not to be checked, for the report.
        first: Logits of the first stage of the error budget; None for the fp32 composition.

    Returns:
        The verdict, and the stages that it adds to the error budget: the eager model in its own
        precision and, where its logits are finite, the artifact; none for a base alone.
    """
    from caliport.validation.artifact import artifact_form, compositions_of
    from caliport.validation.evaluation.budget import Step, measured
    from caliport.validation.gates.limits import limits_for
    from caliport.validation.gates.verdict import validate_artifact

    runtime, precision = artifact_form(directory)
    manifest = read_manifest(directory)
    how, context = Quantization.of(manifest), int(manifest["context"])
    beside = compositions_of(directory) is not None
    alone = references.adapter is None
    in_float = runtime == "onnx" and precision != "fp32" and not beside
    quantized = references.expected(how, runtime, context, beside=beside)
    fp32 = references.answers(Quantization("fp32"), runtime)
    heard: list[Answers] = []
    result = validate_artifact(
        directory,
        references.evaluation,
        quantized=quantized,
        fp32=fp32,
        base=None if alone else references.answers(Quantization("fp32"), runtime, alone=True),
        graph=references.graph(how, context) if in_float else None,
        source=references.source,
        composition=composition,
        method=method,
        limits=limits_for(precision, **limits),
        threads=threads,
        metric=metric,
        bundled=bundled,
        runner=runner,
        notes=notes,
        heard=heard.append,
    )
    if alone:
        return result, ()
    rounds = "ONNX Runtime" if runtime == "onnx" else "ExecuTorch"
    label = "fp32" if precision == "fp32" else f"{precision}, as {rounds} rounds"
    steps = [Step("quantized eager", label, quantized.said.answers)]
    steps += [Step("artifact", f"{precision} in {answers.name}", answers) for answers in heard]
    return result, measured(
        references.evaluation,
        steps,
        metric,
        before=fp32,
        first=fp32.logits if first is None else first,
        form=form_of(runtime, precision, beside),
    )


def budget_of(
    composition: str, references: References, label: str, stages: Sequence[BudgetStage]
) -> Budget:
    """The error budget from calibration on, where the single-task adapters are not known.

    Args:
        composition: Its name in the report.
        references: Of the composition.
        label: Says to people what ships.
        stages: What ``check_artifact`` adds.
    """
    from caliport.validation.evaluation.budget import Step, measured
    from caliport.validation.records.budget import Budget

    evaluation = references.evaluation
    ships = references.answers(Quantization("fp32"), "executorch")
    shared = measured(evaluation, [Step("calibration", label, ships)], METRIC)
    metric = None if evaluation.references is None else METRIC
    return Budget(composition=composition, metric=metric, stages=(*shared, *stages))
