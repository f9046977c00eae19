"""The command ``device``, and what ``--device`` means elsewhere: the same proof over adb."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from caliport.core.errors import InputError
from caliport.on_devices.where import Where, chosen

if TYPE_CHECKING:
    import numpy as np

    from caliport.android_harness.parity import Subject
    from caliport.on_devices.where import Held
    from caliport.run.workspace import Workspace
    from caliport.validation.evaluation.evaluation import Answers
    from caliport.validation.gates.rounding import Expected
    from caliport.validation.records.budget import BudgetStage
    from caliport.validation.records.device import DeviceResult
    from caliport.validation.references import References

_THREADS = 4  # the fast cores of most phones


def _subject(
    artifact: Path,
    references: References,
    composition: str,
    metric: str,
    threads: int | None,
    bundled: str | None,
    precision: str | None = None,
) -> Subject:
    """An artifact with what a device is held to; ``precision`` of one of another tool."""
    from caliport.android_harness.parity import subject_of
    from caliport.validation.evaluation.measures import NotFinite
    from caliport.validation.records.reports import this_machine

    expected, by_token = (None, None) if precision else _expected(artifact, references)
    try:
        return subject_of(
            artifact,
            references.evaluation,
            expected=expected,
            composition=composition,
            metric=metric,
            threads=threads or min(_THREADS, this_machine().cores),
            bundled=bundled,
            precision=precision,
            by_token=by_token,
        )
    except NotFinite as problem:
        raise InputError(f"{artifact}: {problem}; expected a sound artifact") from None


def _expected(
    artifact: Path, references: References
) -> tuple[Expected, Callable[[], Answers] | None]:
    """What an artifact should say, and ``Subject.by_token``."""
    from caliport.core.directories import read_manifest
    from caliport.export.quantization.choices import Quantization
    from caliport.validation.artifact import artifact_form, compositions_of

    manifest = read_manifest(artifact)
    how, (runtime, precision) = Quantization.of(manifest), artifact_form(artifact)
    beside = compositions_of(artifact) is not None
    expected = references.expected(how, runtime, int(manifest["context"]), beside=beside)
    if (runtime, precision) != ("onnx", "int4"):
        return expected, None
    return expected, partial(references.answers, how, runtime, beside=beside, rounds="executorch")


def _stages(subject: Subject, references: References, found: Sequence[Held]) -> list[BudgetStage]:
    """The stages of an error budget from the quantized eager model to the device."""
    from caliport.export.quantization.choices import Quantization
    from caliport.validation.evaluation.budget import Step, measured

    assert subject.expected is not None
    fp32 = references.answers(Quantization("fp32"), "executorch")
    eager = subject.expected.said.answers
    steps = [
        Step("quantized eager", eager.name, eager),
        Step("artifact", f"{subject.precision} in {subject.runner.name}", subject.answers),
    ]
    form = _form(subject)
    before = measured(
        subject.evaluation, steps, subject.metric, before=fp32, first=fp32.logits, form=form
    )
    return [*before, *_device_stage(subject, found, fp32.logits)]


def _device_stage(
    subject: Subject, found: Sequence[Held], first: Sequence[np.ndarray]
) -> list[BudgetStage]:
    """Of the device that is farthest from the artifact here; none where none told logits."""
    from caliport.validation.evaluation.budget import Step, measured

    told = [
        (result.measures.kl, number, result, answers)
        for number, (result, answers) in enumerate(found)
        if result.measures is not None and answers is not None
    ]
    if not told:
        return []
    _, _, result, answers = max(told)
    label = f"{subject.precision} on {result.device.shown}"
    if len(told) > 1:
        label += f", the farthest of {len(told)}"
    return list(
        measured(
            subject.evaluation,
            [Step("device", label, answers)],
            subject.metric,
            before=subject.answers,
            first=first,
            form=_form(subject),
        )
    )


def _form(subject: Subject) -> str:
    from caliport.validation.artifact import artifact_form, compositions_of, form_of

    bundle = compositions_of(subject.directory) is not None
    return form_of(artifact_form(subject.directory)[0], subject.precision, bundle)


def validate_rows(space: Workspace, wanted: Sequence[str]) -> bool:
    """Hold every artifact of a recipe on devices to itself here, and add that to its reports.

    Args:
        space: Validated on this machine.
        wanted: The devices.

    Returns:
        Whether all gates passed.

    Raises:
        InputError: A device that cannot be used; the reports then have what the others said.
    """
    from caliport.core.progress import progress
    from caliport.run.export import ALONE, rows_of
    from caliport.run.resolve import best_method
    from caliport.run.validate import first_logits, references_of, threads_of
    from caliport.validation.evaluation.budget import with_stage
    from caliport.validation.records.reports import PARITY, ParityReport, read_result, write_result
    from caliport.validation.report.junit import write_junit

    where = Where(tuple(chosen(wanted)))
    kept: dict[str, References] = {}
    report = read_result(ParityReport, space.reports / PARITY)
    budgets = {budget.composition: budget for budget in report.budgets}
    results: list[DeviceResult] = []
    troubles: list[InputError] = []
    for row in rows_of(space):
        name, metric = row.composition, space.recipe.evaluation.metric
        adapter = None if name == ALONE else space.composed(name, best_method(space, name))
        with progress(f"{name}: {row.form} on {where.shown}", None):
            references = references_of(space, name, adapter, kept)
            subject = _subject(
                row.artifact, references, name, metric, threads_of(space), row.bundled
            )
            found, wrong = where.check(subject)
        results += [result for result, _ in found]
        troubles += wrong
        if found and name in budgets:
            first = first_logits(space, name, references.evaluation)
            for stage in _device_stage(subject, found, first):
                budgets[name] = with_stage(budgets[name], stage)
    more = {"budgets": list(budgets.values()), "devices": results}
    report = report.model_copy(update=more)
    write_result(report, space.reports / PARITY)
    write_junit([*report.artifacts, *report.devices], space.reports / "junit.xml")
    if troubles:
        raise troubles[0]
    return all(result.passed for result in results)
