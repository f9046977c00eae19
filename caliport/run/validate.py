"""The last part of a run: compare artifacts with eager models, error budget, reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.directories import read_manifest
from caliport.core.progress import progress
from caliport.export.artifact import BASE_ALONE, Artifact
from caliport.recipe.methods import CORRECTED, parse
from caliport.recipe.schema import prompt_of
from caliport.run.export import Row, rows_of
from caliport.run.resolve import best_method, compose_settings, reported, weights_of
from caliport.run.workspace import Workspace, need
from caliport.stages.compose import merge_under, merged
from caliport.stages.stage import stage
from caliport.validation.check import check_artifact
from caliport.validation.references import FP32, EagerReferences

if TYPE_CHECKING:
    import numpy as np

    from caliport.validation.evaluation.budget import StageAnswers
    from caliport.validation.evaluation.evaluation import Evaluation
    from caliport.validation.records.budget import BudgetStage

_STAGES, _FIRST = "stages.json", "first.npy"


def validate_all(space: Workspace, *, latency: bool = True) -> bool:
    """Validate every artifact and time all together, write the reports; whether all gates passed.

    ``latency=False`` times nothing.
    """
    from caliport.run.bench import time_all
    from caliport.validation.latency.workload import Candidate
    from caliport.validation.records.reports import LATENCY

    check_baseline(space)
    kept: dict[str, EagerReferences] = {}
    for row in rows_of(space):
        need(row.artifact, f"{row.form} artifact", "export")
    for name in space.recipe.compositions:
        _begin_budget(space, name, kept)
    for row in rows_of(space):
        _validate(space, row, kept)
    if latency:
        candidates = [
            Candidate(Artifact.read(row.artifact), row.composition, row.bundled)
            for row in rows_of(space)
        ]
        time_all(space, candidates, threads_of(space))
    else:
        (space.reports / LATENCY).unlink(missing_ok=True)
    return _write_parity(space)


def check_baseline(space: Workspace) -> None:
    """Refuse a baseline that cannot be read, before anything is made."""
    from caliport.validation.baseline.baseline import read_baseline
    from caliport.validation.records.reports import this_machine

    if space.recipe.validation.baseline is not None:
        read_baseline(space.recipe.validation.baseline, this_machine())


def threads_of(space: Workspace) -> int:
    """Threads to run artifacts with: the recipe's, or the cores this process may use."""
    from caliport.validation.records.reports import this_machine

    return space.recipe.validation.threads or this_machine().cores


def _begin_budget(space: Workspace, name: str, kept: dict[str, EagerReferences]) -> None:
    """The stages of a composition that all its artifacts share, and the first one's logits."""
    recipe = space.recipe
    method = best_method(space, name)
    adapters = {task: space.adapter(task) for task in recipe.compositions[name]}
    composed = space.composed(name, method)
    title = f"{name}: error budget up to calibration"

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        import numpy as np

        from caliport.validation.evaluation.budget import measured

        with progress(title, None):
            references = recipe_references(space, name, composed, kept)
            shared = _shared_stages(space, name, method, references)
            stages = measured(references.evaluation, shared, recipe.evaluation.metric)
        _write_stages(partial, stages)
        np.save(partial / _FIRST, np.concatenate(shared[0].answers.logits))

    how = recipe.calibration
    settings = {**_asked(space, name), "method": method}
    settings["merge"] = [how.merge or "linear", how.density, recipe.seed]
    if how.weights is not None:
        settings["weights"] = how.weights
    inputs: dict[str, Path | str] = {"base": space.base, "composed": composed}
    inputs |= {"examples": space.data / f"{name}.validation.jsonl"}
    inputs |= {f"adapter {task}": path for task, path in adapters.items()}
    stage(space.kept("budget", name), "budget", title, inputs, settings, build)


def _shared_stages(
    space: Workspace, name: str, method: str, references: EagerReferences
) -> list[StageAnswers]:
    """Exact sum, the merge under a correction, and what ships, all in fp32."""
    from caliport.calibrate import read_peft
    from caliport.validation.evaluation.budget import StageAnswers

    made = parse(method)
    how = compose_settings(space, made)
    updates = [read_peft(space.adapter(task)) for task in space.recipe.compositions[name]]
    weights = weights_of(space, name)
    if how.searches:
        weights = read_manifest(space.composed(name, method))["weights"]
    label = f"1/{len(updates)} of each adapter"
    if weights is not None:
        label = f"weights {', '.join(f'{weight:g}' for weight in weights)}"
    exact = references.of_update(merged("exact", updates, weights, how), "exact sum")
    stages = [StageAnswers("exact sum", label, exact)]
    if made.kind in CORRECTED and not made.alone:
        kind = merge_under(how.merge, updates)
        label = parse(kind).label
        merge = references.of_update(merged(kind, updates, weights, how), label)
        stages.append(StageAnswers("merge", label, merge))
    return [*stages, StageAnswers("calibration", made.label, references.answers(FP32))]


def first_logits(space: Workspace, name: str, evaluation: Evaluation) -> list[np.ndarray]:
    """Logits of the first stage of a composition's budget, [targets, vocab] a prompt."""
    import numpy as np

    rows = np.load(space.kept("budget", name) / _FIRST, mmap_mode="r")
    ends = np.cumsum([len(target) for target in evaluation.targets])
    return np.split(rows, ends[:-1])


def _write_stages(directory: Path, stages: Sequence[BudgetStage]) -> None:
    (directory / _STAGES).write_text(json.dumps([s.model_dump(mode="json") for s in stages]))


def _read_stages(directory: Path) -> list[BudgetStage]:
    from caliport.validation.records.budget import BudgetStage
    from caliport.validation.records.record import read_record

    return read_record(list[BudgetStage], directory / _STAGES)


def _validate(space: Workspace, row: Row, kept: dict[str, EagerReferences]) -> None:
    from caliport.validation.gates.criteria import Caption
    from caliport.validation.records.reports import PARITY
    from caliport.validation.runners import engine
    from caliport.validation.runners.open import PLAIN, Execution

    recipe, name = space.recipe, row.composition
    alone = name == BASE_ALONE
    method = "base" if alone else best_method(space, name)
    adapter = None if alone else space.composed(name, method)
    asked = _asked_by(space, name)
    title = f"{name}: validation of {row.form}"
    limits = recipe.validation.limits.get(row.precision, {})  # type: ignore[call-overload]
    has_choice = bool(engine.get(row.runtime).alternatives)
    runner = recipe.validation.runner if has_choice else PLAIN
    threads = threads_of(space)

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        with progress(title, None):
            references = recipe_references(space, name, adapter, kept)
            result, stages = check_artifact(
                Execution(Artifact.read(row.artifact), threads, row.bundled, runner),
                references,
                Caption(name, method),
                metric=recipe.evaluation.metric,
                limits=limits,
                first=None if alone else first_logits(space, name, references.evaluation),
            )
        (partial / PARITY).write_text(result.model_dump_json())
        _write_stages(partial, stages)

    inputs: dict[str, Path | str] = {
        "artifact": row.artifact,
        "base": space.base,
        "examples": space.data / f"{asked}.validation.jsonl",
    }
    if adapter is not None:
        inputs |= {"adapter": adapter, "budget": space.kept("budget", name)}
    if row.bundle:
        tasks = recipe.compositions[asked]
        inputs |= {f"shared {task}": space.adapter(task) for task in tasks}
    settings = {**_asked(space, asked), "method": method}
    settings |= {"limits": limits, "runner": runner, "threads": threads}
    stage(space.kept("parity", name, row.form), "validate", title, inputs, settings, build)


def _asked(space: Workspace, composition: str) -> dict[str, Any]:
    """The settings that decide what models are asked and how it is scored."""
    recipe = space.recipe
    return {
        "examples": recipe.validation.examples,
        "prompt": prompt_of(recipe, composition, best_method(space, composition)),
        "max_new_tokens": recipe.evaluation.max_new_tokens,
        "metric": recipe.evaluation.metric,
        "by_layer": recipe.validation.by_layer,
    }


def recipe_references(
    space: Workspace, name: str, adapter: Path | None, kept: dict[str, EagerReferences]
) -> EagerReferences:
    """References on a composition's examples, made once; a base's are nobody's task."""
    from caliport.core.checkpoints import load_tokenizer
    from caliport.export.reference.folded import eager
    from caliport.validation.evaluation.evaluation import make_evaluation

    if name in kept:
        return kept[name]
    recipe = space.recipe
    asked = _asked_by(space, name)
    model = eager(space.base, adapter, "fp32")
    examples = reported(space, asked, recipe.validation.examples)
    prompt = prompt_of(recipe, asked, best_method(space, asked))
    evaluation = make_evaluation(
        model,
        load_tokenizer(space.base, model),
        [prompt.replace("{input}", e.input) for e in examples],
        None if adapter is None else [e.output for e in examples],
        max_new_tokens=recipe.evaluation.max_new_tokens,
    )
    shared = {task: space.adapter(task) for task in recipe.compositions[asked]}
    by_layer = recipe.validation.by_layer
    kept[name] = EagerReferences(evaluation, space.base, adapter, shared, by_layer)
    return kept[name]


def _asked_by(space: Workspace, name: str) -> str:
    """The composition whose examples are asked; a bundle's base has none of its own."""
    return next(iter(space.recipe.compositions)) if name == BASE_ALONE else name


def _write_parity(space: Workspace) -> bool:
    from caliport.validation.baseline.regression import with_baseline_gates
    from caliport.validation.records.budget import Budget
    from caliport.validation.records.latency import LatencyReport
    from caliport.validation.records.record import read_record
    from caliport.validation.records.reports import (
        JUNIT,
        LATENCY,
        PARITY,
        QUALITY,
        ArtifactResult,
        ParityReport,
        QualityReport,
        environment,
        read_if_there,
        this_machine,
        write_result,
    )
    from caliport.validation.report.junit import write_junit

    reports, recipe, found = space.reports, space.recipe, []
    stages = {name: _read_stages(space.kept("budget", name)) for name in recipe.compositions}
    for row in rows_of(space):
        part = space.kept("parity", row.composition, row.form)
        found.append(read_record(ArtifactResult, part / PARITY))
        if row.composition != BASE_ALONE:
            stages[row.composition] += _read_stages(part)
    facts: dict[str, Any] = {"machine": this_machine(), "versions": environment()}
    budgets = [
        Budget(composition=name, metric=recipe.evaluation.metric, stages=tuple(members))
        for name, members in stages.items()
    ]
    report = with_baseline_gates(
        ParityReport(**facts, artifacts=found, budgets=budgets),
        recipe.validation.baseline,
        recipe.validation.regression,
        read_if_there(LatencyReport, reports / LATENCY),
        read_if_there(QualityReport, reports / QUALITY),
    )
    write_result(report, reports / PARITY)
    write_junit(report.artifacts, reports / JUNIT)
    return all(result.passed for result in report.artifacts)
