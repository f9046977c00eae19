"""The second half of a run: artifacts, their validation, the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.composing import examples_of
from caliport.recipe import prompt_of
from caliport.references import References
from caliport.scoring import best_method
from caliport.workspace import Workspace, need, stage
from caliport_core.directories import MANIFEST, read_manifest
from caliport_core.progress import progress, working
from export.artifact import Quantization
from export.bundling import bundle_inputs, bundle_settings, check_names

if TYPE_CHECKING:
    from validation.results import ArtifactResult


ALONE = "base alone"
"""What stands for a composition where a bundle's base is meant."""


@dataclass(frozen=True)
class _Row:
    """What a recipe ships and validates: an artifact, or one part of a bundle.

    ``composition`` is ``ALONE`` for a bundle's base.
    """

    composition: str
    runtime: str
    precision: str
    artifact: Path
    bundle: bool = False

    @property
    def bundled(self) -> str | None:
        """The composition to run of a bundle."""
        return self.composition if self.bundle and self.composition != ALONE else None

    @property
    def form(self) -> str:
        """Names it within its composition."""
        return f"{self.runtime}-{self.precision}{'-bundle' if self.bundle else ''}"


def _rows(space: Workspace) -> Iterator[_Row]:
    recipe = space.recipe
    forms = [(r, p) for r in recipe.export.runtimes for p in recipe.export.precisions]
    if "fold" in recipe.export.ship:
        for name in recipe.compositions:
            yield from (_Row(name, r, p, space.artifact(name, r, p)) for r, p in forms)
    if "bundle" in recipe.export.ship:
        for name in (*recipe.compositions, ALONE):
            yield from (_Row(name, r, p, space.bundle(r, p), bundle=True) for r, p in forms)


def export_all(space: Workspace, *, preflight: bool = True) -> None:
    """Export all compositions in every form that the recipe asks for."""
    recipe, settings = space.recipe, space.recipe.export
    adapters = {
        name: need(space.composed(name, best_method(space, name)), "composed adapter", "calibrate")
        for name in recipe.compositions
    }
    shared = {t: space.adapter(t) for tasks in recipe.compositions.values() for t in tasks}
    for row in _rows(space):
        how = Quantization(
            row.precision,
            settings.int8_layers if row.precision == "int4" else (),
            settings.embedding_bits if row.precision == "int4" else None,
            settings.cache_bits if row.runtime == "executorch" else None,
        )
        form = f"{row.runtime} {row.precision}"
        if not row.bundle:
            export_to(
                row.artifact,
                f"{row.composition}: {form}",
                space.base,
                adapters[row.composition],
                row.runtime,
                how,
                settings.context,
                preflight=preflight,
            )
        elif row.composition == ALONE:
            bundle_to(
                row.artifact,
                f"bundle of {len(adapters)}: {form}",
                space.base,
                adapters,
                shared if row.runtime == "executorch" else {},
                row.runtime,
                how,
                settings.context,
                preflight=preflight,
            )


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

    def fill_it(partial: Path, extra: dict[str, Any]) -> None:
        from export.artifact import fill

        fill(partial, extra, base, runtime, adapter, how, context)

    adapters = [] if adapter is None else [adapter]
    inputs = {"base": base} | ({} if adapter is None else {"adapter": adapter})
    settings = {"runtime": runtime, "context": context, **asdict(how)}

    def say_needs() -> None:
        _say_needs(base, adapters, runtime, how, out, refuse=preflight, context=context)

    _made(out, title, inputs, settings, say_needs, fill_it)


def bundle_to(
    out: Path,
    title: str,
    base: str | Path,
    compositions: Mapping[str, Path],
    shared: Mapping[str, Path],
    runtime: str,
    how: Quantization,
    context: int | None,
    *,
    preflight: bool = True,
) -> None:
    """Export one base with all compositions beside it, unless it is up to date.

    Args:
        out: The directory.
        title: What to tell the user.
        base: A Hugging Face directory or hub name.
        compositions: PEFT LoRA directories by name.
        shared: For ExecuTorch, single-task adapters by name, to be stored once.
        runtime: ``executorch`` or ``onnx``.
        how: How the base is quantized.
        context: Tokens of the cache; None for the base's own maximum.
        preflight: Stop where memory or disk seem too small.

    Raises:
        InputError: See ``export.to_executorch_bundle`` and ``export.to_onnx_bundle``.
    """
    check_names(runtime, compositions)

    def fill_it(partial: Path, extra: dict[str, Any]) -> None:
        from export import bundling, onnx_bundle

        if runtime == "onnx":
            onnx_bundle.fill_bundle(partial, extra, base, compositions, how, context)
        else:
            bundling.fill_bundle(partial, extra, base, compositions, shared, how, context)

    def say_needs() -> None:
        given = list(compositions.values()), list(shared.values())
        _say_needs(
            base, given[0], runtime, how, out, refuse=preflight, context=context, shared=given[1]
        )

    inputs = bundle_inputs(base, compositions, shared)
    _made(out, title, inputs, bundle_settings(runtime, how, context), say_needs, fill_it)


def _made(
    out: Path,
    title: str,
    inputs: Mapping[str, Path | str],
    settings: Mapping[str, Any],
    say_needs: Callable[[], None],
    fill_it: Callable[[Path, dict[str, Any]], None],
) -> None:
    """Make an artifact unless it is up to date, and say before what that needs."""
    # Hashing reads the base once, so say what is needed before; but not of what may be skipped.
    may_be_skipped = (out / MANIFEST).is_file()
    if not may_be_skipped:
        say_needs()

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        if may_be_skipped:
            say_needs()
        with working(title):
            fill_it(partial, extra)

    # No times in an artifact: the same inputs give the same bytes.
    stage(out, "export", title, inputs, settings, build, timed=False)


def _say_needs(*given: Any, **more: Any) -> None:
    from export.preflight import preflight

    preflight(*given, **more)


def validate_all(space: Workspace, *, latency: bool = True) -> bool:
    """Validate every artifact and time all together, write the reports; whether all gates passed.

    ``latency=False`` times nothing.
    """
    from caliport.benching import time_all
    from validation.latency import Subject
    from validation.results import LATENCY

    check_baseline(space)
    kept: dict[str, References] = {}
    for row in _rows(space):
        need(row.artifact, f"{row.form} artifact", "export")
        _validate(space, row, kept)
    if latency:
        rows = [Subject(row.artifact, row.composition, row.bundled) for row in _rows(space)]
        time_all(space, rows, threads_of(space))
    else:
        (space.reports / LATENCY).unlink(missing_ok=True)
    return _write_parity(space)


def check_baseline(space: Workspace) -> None:
    """Refuse a baseline that cannot be read before anything is made that is held to it."""
    from validation.baseline import read_baseline
    from validation.results import this_machine

    if space.recipe.validation.baseline is not None:
        read_baseline(space.recipe.validation.baseline, this_machine())


def threads_of(space: Workspace) -> int:
    """Threads to run artifacts with: the recipe's, or the cores this process may use."""
    from validation.results import this_machine

    return space.recipe.validation.threads or this_machine().cores


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
    notes: Sequence[str] = (),
) -> ArtifactResult:
    """Hold one artifact, or part of a bundle, against its references, for recipes and for flags."""
    from validation.gates import limits_for
    from validation.runner import artifact_form, compositions_of
    from validation.validate import validate_artifact

    runtime, precision = artifact_form(directory)
    manifest = read_manifest(directory)
    fp32, how, context = Quantization("fp32"), Quantization.of(manifest), int(manifest["context"])
    beside = compositions_of(directory) is not None
    alone = references.adapter is None
    in_float = runtime == "onnx" and precision != "fp32" and not beside
    return validate_artifact(
        directory,
        references.evaluation,
        quantized=references.expected(how, runtime, context, beside=beside),
        fp32=references.answers(fp32, runtime),
        base=None if alone else references.answers(fp32, runtime, alone=True),
        graph=references.graph(how, context) if in_float else None,
        source=references.source,
        composition=composition,
        method=method,
        limits=limits_for(precision, **limits),
        threads=threads,
        metric=metric,
        bundled=bundled,
        notes=notes,
    )


def _validate(space: Workspace, row: _Row, kept: dict[str, References]) -> None:
    recipe, name = space.recipe, row.composition
    method = "base" if name == ALONE else best_method(space, name)
    adapter = None if name == ALONE else space.composed(name, method)
    asked = next(iter(recipe.compositions)) if name == ALONE else name
    shared = {task: space.adapter(task) for task in recipe.compositions[asked]}
    title = f"{name}: validation of {row.form}"
    limits = recipe.validation.limits.get(row.precision, {})  # type: ignore[call-overload]

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        with progress(title, None):
            if name not in kept:
                kept[name] = _references(space, asked, adapter, shared)
            references = kept[name]
            result = check_artifact(
                row.artifact,
                references,
                composition=name,
                method=method,
                metric=recipe.evaluation.metric,
                threads=threads_of(space),
                limits=limits,
                bundled=row.bundled,
            )
        (partial / "parity.json").write_text(result.model_dump_json())

    inputs: dict[str, Path | str] = {
        "artifact": row.artifact,
        "base": space.base,
        "examples": space.data / f"{asked}.validation.jsonl",
    }
    if adapter is not None:
        inputs["adapter"] = adapter
    if row.bundle:
        inputs |= {f"shared {task}": path for task, path in shared.items()}
    settings = {
        "validation": recipe.validation.model_dump(
            mode="json", exclude={"repetitions", "baseline", "regression"}
        ),
        "evaluation": recipe.evaluation,
        "threads": threads_of(space),
        "method": method,
    }
    stage(space.kept("parity", name, row.form), "validate", title, inputs, settings, build)


def _references(
    space: Workspace, composition: str, adapter: Path | None, shared: Mapping[str, Path]
) -> References:
    """References on a composition's examples; the base's answers to them are nobody's task."""
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
        None if adapter is None else [e.output for e in examples],
        max_new_tokens=recipe.evaluation.max_new_tokens,
    )
    return References(evaluation, space.base, adapter, shared)


def _write_parity(space: Workspace) -> bool:
    from validation.junit import write_junit
    from validation.regression import held
    from validation.results import (
        LATENCY,
        PARITY,
        QUALITY,
        ArtifactResult,
        LatencyReport,
        ParityReport,
        QualityReport,
        environment,
        read_if_there,
        this_machine,
        write_result,
    )

    reports, settings, found = space.reports, space.recipe.validation, []
    for row in _rows(space):
        part = space.kept("parity", row.composition, row.form)
        found.append(ArtifactResult.model_validate(json.loads((part / "parity.json").read_text())))
    facts: dict[str, Any] = {"machine": this_machine(), "versions": environment()}
    report = held(
        ParityReport(**facts, artifacts=found),
        settings.baseline,
        settings.regression,
        read_if_there(LatencyReport, reports / LATENCY),
        read_if_there(QualityReport, reports / QUALITY),
    )
    write_result(report, reports / PARITY)
    write_junit(report.artifacts, reports / "junit.xml")
    return all(result.passed for result in report.artifacts)
