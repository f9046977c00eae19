"""Validation on devices: the rest of ``validate --device`` and of ``device validate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from caliport.core.errors import InputError
from caliport.core.progress import progress
from caliport.export.artifact import Artifact
from caliport.on_devices.where import Where, chosen
from caliport.validation.references import FP32, EagerReferences
from caliport.validation.runners.open import Execution

if TYPE_CHECKING:
    import numpy as np

    from caliport.android_harness.parity import HostReference
    from caliport.on_devices.where import DeviceAnswers
    from caliport.run.workspace import Workspace
    from caliport.validation.api import Composition, Validation
    from caliport.validation.evaluation.evaluation import Answers
    from caliport.validation.records.budget import Budget, BudgetStage
    from caliport.validation.records.device import DeviceResult
    from caliport.validation.records.reports import ParityReport

_THREADS = 4  # the fast cores of most phones


def validate_on(asked: Sequence[Validation], where: Where) -> tuple[ParityReport, list[InputError]]:
    """Compare artifacts on devices with themselves on this machine.

    Args:
        asked: The artifacts.
        where: The devices and what runs artifacts on them.

    Returns:
        The report, and why devices that are not in it gave no result.

    Raises:
        InputError: An artifact or adapters that do not fit each other.
    """
    from caliport.validation.api import compositions_to_check, stated_precision
    from caliport.validation.records.reports import ParityReport, environment, this_machine

    results: list[DeviceResult] = []
    budgets: list[Budget] = []
    troubles: list[InputError] = []
    for each in asked:
        stated_precision(each.artifact, each.options.precision)
    for each in asked:
        for composition in compositions_to_check(each):
            title = f"{each.artifact.directory} on {where.shown}: {composition.label}"
            with progress(title, None):
                found, wrong, budget = _validate(each, composition, where)
            results += [result for result, _ in found]
            troubles += wrong
            budgets += budget
    report = ParityReport(
        machine=this_machine(),
        versions=environment(),
        artifacts=[],
        budgets=budgets,
        devices=results,
    )
    return report, troubles


def _validate(
    asked: Validation, composition: Composition, where: Where
) -> tuple[list[DeviceAnswers], list[InputError], list[Budget]]:
    """One composition on all devices, and its error budget, if there is one."""
    from caliport.validation.api import make_references
    from caliport.validation.check import budget_of
    from caliport.validation.gates.criteria import METRIC
    from caliport.validation.records.reports import this_machine

    references = make_references(asked, composition.adapter, composition.name)
    threads = asked.options.threads or min(_THREADS, this_machine().cores)
    execution = Execution(asked.artifact, threads, composition.name)
    host = _host(execution, references, composition.label, METRIC, asked.options.precision)
    found, wrong = where.check(host)
    if not found or composition.adapter is None or not asked.artifact.is_ours:
        return found, wrong, []
    stages = _stages(host, references, found)
    return (
        found,
        wrong,
        [budget_of(composition.label, references, composition.adapter.name, stages)],
    )


def _host(
    execution: Execution,
    references: EagerReferences,
    composition: str,
    metric: str,
    precision: str | None = None,
) -> HostReference:
    """An artifact on this machine; ``precision`` of one of another tool."""
    from caliport.android_harness.parity import host_reference
    from caliport.validation.evaluation.measures import NotFinite

    artifact = execution.artifact
    try:
        host = host_reference(
            execution,
            references.evaluation,
            composition=composition,
            metric=metric,
            expected=references.expected(artifact) if artifact.is_ours else None,
            precision=precision,
        )
    except NotFinite as problem:
        raise InputError(f"{artifact.directory}: {problem}; expected a sound artifact") from None
    return replace(host, by_token=_on_arm(artifact, references)) if artifact.is_ours else host


def _on_arm(artifact: Artifact, references: EagerReferences) -> Callable[[], Answers] | None:
    """``HostReference.by_token``."""
    from caliport.validation.runners import engine

    rounding = engine.get(artifact.runtime).arm_rounding.get(artifact.precision)
    if rounding is None:
        return None
    return partial(
        references.answers,
        artifact.quantization,
        artifact.runtime,
        beside=artifact.is_bundle,
        rounding=rounding,
    )


def _stages(
    host: HostReference, references: EagerReferences, found: Sequence[DeviceAnswers]
) -> list[BudgetStage]:
    """The stages of an error budget from the quantized eager model to the device."""
    from caliport.validation.evaluation.budget import StageAnswers, measured

    assert host.expected is not None
    fp32, eager = references.answers(FP32), host.expected.said.answers
    stages = [
        StageAnswers("quantized eager", eager.name, eager),
        StageAnswers("artifact", f"{host.precision} in {host.runner.name}", host.answers),
    ]
    before = measured(
        host.evaluation,
        stages,
        host.metric,
        before=fp32,
        first=fp32.logits,
        form=host.artifact.form,
    )
    return [*before, *_device_stage(host, found, fp32.logits)]


def _device_stage(
    host: HostReference, found: Sequence[DeviceAnswers], first: Sequence[np.ndarray]
) -> list[BudgetStage]:
    """Of the device that is farthest from the artifact here; none where none reported logits."""
    from caliport.validation.evaluation.budget import StageAnswers, measured

    known = [
        (result.measures.kl, number, result, answers)
        for number, (result, answers) in enumerate(found)
        if result.measures is not None and answers is not None
    ]
    if not known:
        return []
    _, _, result, answers = max(known)
    label = f"{host.precision} on {result.device.shown}"
    if len(known) > 1:
        label += f", the farthest of {len(known)}"
    return list(
        measured(
            host.evaluation,
            [StageAnswers("device", label, answers)],
            host.metric,
            before=host.answers,
            first=first,
            form=host.artifact.form,
        )
    )


def validate_rows(space: Workspace, wanted: Sequence[str]) -> bool:
    """Compare every artifact of a recipe on devices with itself here; add that to its reports.

    Args:
        space: Validated on this machine.
        wanted: The devices.

    Returns:
        Whether all gates passed.

    Raises:
        InputError: A device that cannot be used; the reports then have the others' results.
    """
    from caliport.export.artifact import BASE_ALONE
    from caliport.run.export import rows_of
    from caliport.run.resolve import best_method
    from caliport.run.validate import first_logits, recipe_references, threads_of
    from caliport.validation.evaluation.budget import with_stage
    from caliport.validation.records.reports import (
        JUNIT,
        PARITY,
        ParityReport,
        read_result,
        write_result,
    )
    from caliport.validation.report.junit import write_junit

    where = Where(tuple(chosen(wanted)))
    kept: dict[str, EagerReferences] = {}
    report = read_result(ParityReport, space.reports / PARITY)
    budgets = {budget.composition: budget for budget in report.budgets}
    results: list[DeviceResult] = []
    troubles: list[InputError] = []
    for row in rows_of(space):
        name, metric = row.composition, space.recipe.evaluation.metric
        adapter = None if name == BASE_ALONE else space.composed(name, best_method(space, name))
        with progress(f"{name}: {row.form} on {where.shown}", None):
            references = recipe_references(space, name, adapter, kept)
            artifact = Artifact.read(row.artifact)
            execution = Execution(artifact, threads_of(space), row.bundled)
            host = _host(execution, references, name, metric)
            found, wrong = where.check(host)
        results += [result for result, _ in found]
        troubles += wrong
        if found and name in budgets:
            first = first_logits(space, name, references.evaluation)
            for stage in _device_stage(host, found, first):
                budgets[name] = with_stage(budgets[name], stage)
    more = {"budgets": list(budgets.values()), "devices": results}
    report = report.model_copy(update=more)
    write_result(report, space.reports / PARITY)
    write_junit([*report.artifacts, *report.devices], space.reports / JUNIT)
    if troubles:
        raise troubles[0]
    return all(result.passed for result in results)
