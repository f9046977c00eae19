"""``caliport validate ARTIFACT``: validate one artifact from flags, without a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from caliport.core.errors import InputError
from caliport.core.progress import progress
from caliport.data.examples import read_jsonl

if TYPE_CHECKING:
    from caliport.validation.api import Validation


def validate_one(
    asked: Validation,
    out: Path | None = None,
    *,
    latency: bool = True,
    baseline: Path | None = None,
) -> bool:
    """Validate one artifact or each part of a bundle, show gates, and write reports if asked to.

    Args:
        asked: What to validate and how.
        out: Where to write reports.
        latency: Measure times and memory too.
        baseline: A stored baseline to compare with as well.

    Returns:
        Whether every gate passed.

    Raises:
        InputError: See ``caliport.validation.api.run``; or a baseline that cannot be read.
    """
    from caliport.core.directories import MANIFEST
    from caliport.run.bench import time_one
    from caliport.show.github import publish
    from caliport.show.tables import show_baseline, show_budget, show_gates
    from caliport.validation.api import compositions_to_check, run, write_reports
    from caliport.validation.baseline.baseline import read_baseline
    from caliport.validation.baseline.regression import RegressionLimits, with_baseline_gates
    from caliport.validation.latency.workload import Candidate
    from caliport.validation.records.reports import this_machine

    if baseline is not None:
        read_baseline(baseline, this_machine())
    artifact, threads = asked.artifact, asked.options.threads or this_machine().cores
    title = f"validating {artifact.directory}"
    report, longest = run(asked, lambda label: progress(f"{title}: {label}", None))
    candidates = [Candidate(artifact, c.label, c.name) for c in compositions_to_check(asked)]
    times = time_one(candidates, longest, threads) if latency else None
    report = with_baseline_gates(report, baseline, RegressionLimits(), times)
    for result in report.artifacts:
        show_gates(result)
    for budget in report.budgets:
        show_budget(budget)
    show_baseline(report)
    if out is not None:
        print(f"report: {write_reports(report, out, times)}")
    publish(report, times.artifacts if times else [], artifact.directory / MANIFEST, out)
    return report.passed


def read_prompts(
    path: Path | None, prompt: str | None
) -> tuple[list[tuple[str, str]] | None, list[str]]:
    """Inputs and right answers of a JSON Lines file, and where each stands; None for no file.

    Args:
        path: With ``input`` and ``output`` on each line.
        prompt: The template given for them, if any.

    Raises:
        InputError: It cannot be read, or has no examples; or a template without a file.
    """
    if path is None:
        if prompt is not None:
            raise InputError("--prompt goes with --prompts FILE, whose inputs it is put around")
        return None, []
    examples = read_jsonl(path)
    return [(e.input, e.output) for e in examples], [f"{path}, line {e.line}" for e in examples]
