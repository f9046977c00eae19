"""The second half of a run: artifacts, their validation, the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.composing import examples_of
from caliport.recipe import prompt_of
from caliport.scoring import best_method
from caliport.workspace import Workspace, need, stage
from caliport_core.directories import MANIFEST, read_manifest
from caliport_core.progress import progress, working
from export.artifact import Quantization

if TYPE_CHECKING:
    from validation.evaluation import Answers, Evaluation
    from validation.results import ArtifactResult


def _forms(space: Workspace) -> Iterator[tuple[str, str, str, Path]]:
    """Composition, runtime, precision and directory of every artifact of a recipe."""
    for composition in space.recipe.compositions:
        for runtime in space.recipe.export.runtimes:
            for precision in space.recipe.export.precisions:
                yield (
                    composition,
                    runtime,
                    precision,
                    space.artifact(composition, runtime, precision),
                )


def export_all(space: Workspace, *, preflight: bool = True) -> None:
    """Export each composition in every form that the recipe asks for."""
    settings = space.recipe.export
    for composition, runtime, precision, out in _forms(space):
        method = best_method(space, composition)
        adapter = need(space.composed(composition, method), "composed adapter", "calibrate")
        title = f"{composition}: {runtime} {precision}"
        kept = settings.int8_layers if precision == "int4" else ()
        bits = settings.embedding_bits if precision == "int4" else None
        how = Quantization(precision, kept, bits)
        export_to(
            out, title, space.base, adapter, runtime, how, settings.context, preflight=preflight
        )


def _say_needs(*given: Any, refuse: bool) -> None:
    from export.preflight import preflight

    preflight(*given, refuse=refuse)


def export_to(
    out: Path,
    title: str,
    base: str | Path,
    adapter: Path | None,
    runtime: str,
    how: Quantization,
    context: int | None,
    *,
    preflight: bool = True,
) -> None:
    """Export one artifact, unless it is up to date.

    ``preflight=False`` goes on where memory or disk seem too small.
    """
    # Hashing reads the base once, so say what is needed before; but not of what may be skipped.
    may_be_skipped = (out / MANIFEST).is_file()
    if not may_be_skipped:
        _say_needs(base, adapter, runtime, how.precision, out, refuse=preflight)

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        from export.artifact import fill

        if may_be_skipped:
            _say_needs(base, adapter, runtime, how.precision, out, refuse=preflight)
        with working(title):
            fill(partial, extra, base, runtime, adapter, how, context)

    inputs: dict[str, Path | str] = {"base": base}
    if adapter is not None:
        inputs["adapter"] = adapter
    settings = {"runtime": runtime, "context": context, **asdict(how)}
    # No times in an artifact: the same inputs give the same bytes.
    stage(out, "export", title, inputs, settings, build, timed=False)


def validate_all(space: Workspace) -> bool:
    """Validate and time every artifact, write the reports; whether all gates passed."""
    kept: dict[str, References] = {}
    for composition, runtime, precision, out in _forms(space):
        need(out, f"{runtime} {precision} artifact", "export")
        _validate(space, composition, runtime, precision, out, kept)
    return _write_parity(space)


def threads_of(space: Workspace) -> int:
    """Threads to run artifacts with: the recipe's, or the cores this process may use."""
    from validation.results import this_machine

    return space.recipe.validation.threads or this_machine().cores


class References:
    """Eager answers that several artifacts are held against, made once and kept."""

    def __init__(self, evaluation: Evaluation, base: str | Path, adapter: Path | None) -> None:
        self.evaluation = evaluation
        self._base = base
        self._adapter = adapter
        self._kept: dict[tuple[Path | None, Quantization, str], Answers] = {}

    def answers(self, how: Quantization, runtime: str, alone: bool = False) -> Answers:
        """Of the composition, quantized, as a runtime rounds it; or of the base ``alone``."""
        from export.artifact import reference
        from validation.evaluation import eager_answers

        adapter = None if alone else self._adapter
        wanted = (adapter, how, "executorch" if how.precision == "fp32" else runtime)
        if wanted not in self._kept:
            model = reference(self._base, adapter, how, runtime)
            name = f"eager {how.precision}{' base' if alone else ''}"
            self._kept[wanted] = eager_answers(model, name, self.evaluation, write=not alone)
        return self._kept[wanted]


def check_artifact(
    directory: Path,
    references: References,
    *,
    has_adapter: bool,
    composition: str,
    method: str,
    metric: str,
    threads: int,
    limits: dict[str, float],
) -> ArtifactResult:
    """Hold one artifact against its references; the same code for recipes and for flags."""
    from validation.gates import limits_for
    from validation.runner import artifact_form
    from validation.validate import validate_artifact

    runtime, precision = artifact_form(directory)
    fp32 = Quantization("fp32")
    return validate_artifact(
        directory,
        references.evaluation,
        quantized=references.answers(Quantization.of(read_manifest(directory)), runtime),
        fp32=references.answers(fp32, runtime),
        base=references.answers(fp32, runtime, alone=True) if has_adapter else None,
        composition=composition,
        method=method,
        limits=limits_for(precision, **limits),
        threads=threads,
        metric=metric,
    )


def _validate(
    space: Workspace,
    composition: str,
    runtime: str,
    precision: str,
    artifact: Path,
    kept: dict[str, References],
) -> None:
    recipe = space.recipe
    method = best_method(space, composition)
    adapter = space.composed(composition, method)
    title = f"{composition}: validation of {runtime} {precision}"
    limits = recipe.validation.limits.get(precision, {})  # type: ignore[call-overload]

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        from validation.latency import measure

        with progress(title, None):
            if composition not in kept:
                kept[composition] = _references(space, composition, adapter)
            references = kept[composition]
            result = check_artifact(
                artifact,
                references,
                has_adapter=True,
                composition=composition,
                method=method,
                metric=recipe.evaluation.metric,
                threads=threads_of(space),
                limits=limits,
            )
            prompt = max(references.evaluation.prompts, key=len)
            times = measure(
                artifact,
                prompt,
                min(32, recipe.evaluation.max_new_tokens),
                recipe.validation.repetitions,
                threads_of(space),
                composition=composition,
            )
        (partial / "parity.json").write_text(result.model_dump_json())
        (partial / "latency.json").write_text(times.model_dump_json())

    inputs: dict[str, Path | str] = {
        "artifact": artifact,
        "base": space.base,
        "adapter": adapter,
        "examples": space.data / f"{composition}.validation.jsonl",
    }
    settings = {
        "validation": recipe.validation,
        "evaluation": recipe.evaluation,
        "threads": threads_of(space),
        "method": method,
    }
    out = space.kept("parity", composition, f"{runtime}-{precision}")
    stage(out, "validate", title, inputs, settings, build)


def _references(space: Workspace, composition: str, adapter: Path) -> References:
    from caliport_core.checkpoints import load_tokenizer
    from export.artifact import eager
    from validation.evaluation import make_evaluation

    recipe = space.recipe
    model = eager(space.base, adapter, "fp32")
    examples = examples_of(space, composition, "validation", recipe.validation.examples)
    prompt = prompt_of(recipe, composition, best_method(space, composition))
    evaluation = make_evaluation(
        model,
        load_tokenizer(space.base, model),
        [prompt.replace("{input}", e.input) for e in examples],
        [e.output for e in examples],
        max_new_tokens=recipe.evaluation.max_new_tokens,
    )
    return References(evaluation, space.base, adapter)


def _write_parity(space: Workspace) -> bool:
    from validation.junit import write_junit
    from validation.results import (
        LATENCY,
        PARITY,
        ArtifactResult,
        LatencyReport,
        LatencyResult,
        ParityReport,
        environment,
        this_machine,
        write_result,
    )

    found, times = [], []
    for composition, runtime, precision, _ in _forms(space):
        part = space.kept("parity", composition, f"{runtime}-{precision}")
        found.append(ArtifactResult.model_validate(json.loads((part / "parity.json").read_text())))
        times.append(LatencyResult.model_validate(json.loads((part / "latency.json").read_text())))
    facts: dict[str, Any] = {"machine": this_machine(), "versions": environment()}
    report = ParityReport(**facts, artifacts=found)
    write_result(report, space.reports / PARITY)
    write_result(LatencyReport(**facts, artifacts=times), space.reports / LATENCY)
    write_junit(found, space.reports / "junit.xml")
    return all(result.passed for result in found)
