"""One stage from flags alone: the same code that a recipe runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caliport.core.errors import InputError
from caliport.core.progress import progress
from caliport.data.examples import Example, read_jsonl
from caliport.flags.named import named
from caliport.run.export import ALONE
from caliport.validation.check import METRIC, budget_of, check_artifact
from caliport.validation.other_tools import Run, check_foreign
from caliport.validation.references import References


def validate_one(
    artifact: Path,
    base: str,
    adapter: Path | None,
    compositions: Sequence[str],
    shared: Sequence[str],
    prompts: Path | None,
    prompt: str,
    threads: int | None,
    out: Path | None,
    *,
    latency: bool = True,
    baseline: Path | None = None,
    precision: str | None = None,
    against: Path | None = None,
    runner: str = "plain",
    against_runner: str = "plain",
    by_layer: bool = False,
) -> bool:
    """Validate one artifact or each part of a bundle, show gates, and write reports where asked.

    Args:
        artifact: Its directory.
        base: Directory or hub name of the base.
        adapter: What was folded in.
        compositions: Of a bundle, ``NAME=DIR`` of each composition to validate.
        shared: Of a bundle, ``NAME=DIR`` of each shared adapter that those stand on.
        prompts: JSON Lines with ``input`` and ``output``; None for the built-in prompts.
        prompt: Around each input.
        threads: Of the runtime.
        out: Where to write reports.
        latency: Measure times and memory too.
        baseline: A stored baseline to hold it to as well.
        precision: What an artifact of another tool is said to be; decides its limits.
        against: Another artifact, in the place of the fp32 composition; then what both lost is
            not told apart, as with an artifact of another tool.
        runner: What runs the artifact: a word of ``caliport.validation.runners.open.open_runner``.
        against_runner: What runs ``against``.
        by_layer: Show in the error budget how far residual streams are too.

    Raises:
        InputError: No artifact, or flags that do not fit what it is.
    """
    from caliport.core.directories import MANIFEST
    from caliport.run.bench import time_one
    from caliport.show.github import publish
    from caliport.show.tables import show_budget, show_gates, show_held
    from caliport.validation.baseline.baseline import read_baseline
    from caliport.validation.baseline.regression import RegressionLimits, held
    from caliport.validation.latency.measure import Subject
    from caliport.validation.records.reports import (
        LATENCY,
        PARITY,
        ParityReport,
        environment,
        this_machine,
        write_result,
    )
    from caliport.validation.report.junit import write_junit
    from caliport.validation.report.page import write_report
    from caliport.validation.runners.open import check_choice

    said = said_precision(artifact, precision, against)
    check_choice(artifact, runner)
    if against is not None:
        check_choice(against, against_runner)
    if baseline is not None:
        read_baseline(baseline, this_machine())
    adapters = named("--share", shared)
    parts, notes = parts_of(artifact, adapter, named("--bundle", compositions), adapters)
    examples = read_jsonl(prompts) if prompts is not None else None
    threads = threads or this_machine().cores
    results, budgets, longest = [], [], list[int]()
    for label, (bundled, path) in parts.items():
        with progress(f"validating {artifact}: {label}", None):
            references = references_of(base, path, adapters, examples, prompt, by_layer)
            if said is not None:
                result = check_foreign(
                    Run(artifact, runner, bundled),
                    references,
                    said,
                    threads,
                    None if against is None else Run(against, against_runner, bundled),
                    composition=label,
                )
            else:
                result, stages = check_artifact(
                    artifact,
                    references,
                    composition=label,
                    method="adapter" if path is not None else "base",
                    metric=METRIC,
                    threads=threads,
                    limits={},
                    bundled=bundled,
                    runner=runner,
                    notes=notes if label == ALONE else (),
                )
                if path is not None:
                    budgets.append(budget_of(label, references, path.name, stages))
        results.append(result)
        longest = max([longest, *references.evaluation.prompts], key=len)
    subjects = [Subject(artifact, label, bundled) for label, (bundled, _) in parts.items()]
    times = time_one(subjects, longest, threads) if latency else None
    facts: dict[str, Any] = {"machine": this_machine(), "versions": environment()}
    report = ParityReport(**facts, artifacts=results, budgets=budgets)
    report = held(report, baseline, RegressionLimits(), times)
    for result in report.artifacts:
        show_gates(result)
    for budget in report.budgets:
        show_budget(budget)
    show_held(report)
    if out is not None:
        write_result(report, out / PARITY)
        write_junit(report.artifacts, out / "junit.xml")
        if times is not None:
            write_result(times, out / LATENCY)
        print(f"report: {write_report(out)}")
    publish(report, times.artifacts if times else [], artifact / MANIFEST, out)
    return all(result.passed for result in report.artifacts)


def references_of(
    base: str,
    adapter: Path | None,
    shared: Mapping[str, Path],
    examples: Sequence[Example] | None,
    prompt: str,
    by_layer: bool,
) -> References:
    """References on the examples, or on the built-in prompts."""
    from caliport.core.checkpoints import load_tokenizer
    from caliport.export.reference.folded import eager
    from caliport.validation.evaluation.evaluation import make_evaluation

    model = eager(base, adapter, "fp32")
    evaluation = make_evaluation(
        model,
        load_tokenizer(base, model),
        [prompt.replace("{input}", e.input) for e in examples] if examples else None,
        [e.output for e in examples] if examples else None,
    )
    return References(evaluation, base, adapter, shared, by_layer)


def said_precision(artifact: Path, precision: str | None, against: Path | None) -> str | None:
    """The precision of another tool's artifact, or of one that is held to another.

    None for an artifact of ours against eager models; its files are checked here, before the
    references are made, which takes long.
    """
    from caliport.core.directories import check_files
    from caliport.validation.artifact import artifact_form, is_foreign

    if is_foreign(artifact):
        if precision is None:
            raise InputError(f"{artifact}: has no manifest; expected --precision to say what it is")
        return precision
    check_files(artifact)
    if precision is not None:
        raise InputError(f"--precision {precision}: {artifact} has a manifest that says it")
    return None if against is None else artifact_form(artifact)[1]


def parts_of(
    artifact: Path,
    adapter: Path | None,
    compositions: Mapping[str, Path],
    shared: Mapping[str, Path],
) -> tuple[dict[str, tuple[str | None, Path | None]], list[str]]:
    """What to validate, by its label in the report, and notes on what is left out.

    Each is the name of a composition in a bundle (None: the base, or no bundle) and its adapter.
    """
    from caliport.core.directories import read_manifest
    from caliport.validation.artifact import is_foreign

    bundle = None if is_foreign(artifact) else read_manifest(artifact).get("bundle")
    if bundle is None:
        if compositions or shared:
            raise InputError(f"{artifact}: is no bundle; expected --adapter DIR")
        return {artifact.name: (None, adapter)}, []
    known = bundle["compositions"]
    listed = ", ".join(known) or "none"
    if adapter is not None:
        raise InputError(f"{artifact}: is a bundle of {listed}; expected --bundle NAME=DIR")
    for name in compositions:
        if name not in known:
            raise InputError(f"--bundle {name}: {artifact} has no such composition, only {listed}")
        missing = [task for task in known[name].get("stands_on", ()) if task not in shared]
        if missing:
            raise InputError(f"--share {missing[0]}=DIR is missing; {name} stands on that adapter")
    left = [name for name in known if name not in compositions]
    notes = [f"not checked, for want of --bundle NAME=DIR: {', '.join(left)}"] if left else []
    return {ALONE: (None, None), **{n: (n, path) for n, path in compositions.items()}}, notes
