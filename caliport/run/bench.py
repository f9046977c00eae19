"""Times and memory of artifacts, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from caliport.core.progress import console, progress
from caliport.export.artifact import Artifact
from caliport.recipe.schema import prompt_of
from caliport.run.resolve import best_method, reported
from caliport.run.workspace import Workspace
from caliport.stages.stage import stage

if TYPE_CHECKING:
    from caliport.validation.latency.workload import Candidate, Workload
    from caliport.validation.records.latency import LatencyReport

_NEW_TOKENS = 32


def bench(
    artifacts: Sequence[Path], prompt_tokens: int, workload: Workload, out: Path | None
) -> None:
    """Measure any artifacts together and show them against the first.

    Args:
        artifacts: Their directories; of a bundle its base and every composition are measured.
        prompt_tokens: Of the prompt.
        workload: What each of them does.
        out: Where to write ``latency.json`` and the report, or None.

    Raises:
        InputError: See ``caliport.validation.latency.measure.measure``.
    """
    from caliport.show.tables import show_latency
    from caliport.validation.latency.workload import prompt_of
    from caliport.validation.records.reports import LATENCY, check_reports, write_result
    from caliport.validation.report.page import write_report

    if out is not None:
        check_reports(out)
    names = [artifact.name for artifact in artifacts]
    candidates = [
        candidate
        for path in artifacts
        for candidate in candidates_of(
            Artifact.read(path), path.name if names.count(path.name) == 1 else str(path)
        )
    ]
    report = measure_shown(candidates, workload, prompt_of(prompt_tokens))
    show_latency(report)
    if out is not None:
        write_result(report, out / LATENCY)
        print(f"report: {write_report(out)}")


def candidates_of(artifact: Artifact, name: str) -> Iterator[Candidate]:
    """What can be timed: the artifact; of a bundle its base and every composition."""
    from caliport.validation.latency.workload import Candidate

    yield Candidate(artifact, name)
    for composition in artifact.compositions:
        yield Candidate(artifact, f"{name}: {composition}", composition)


def time_all(space: Workspace, candidates: Sequence[Candidate], threads: int) -> None:
    """Measure all artifacts of a recipe together into its reports, anew if any of them changed.

    Every artifact reads the longest validation prompt, cut where its answer needs the room.
    """
    from caliport.validation.latency.workload import Workload
    from caliport.validation.records.latency import LatencyReport
    from caliport.validation.records.reports import LATENCY, read_result, write_result

    recipe, out = space.recipe, space.kept("latency")
    new_tokens = max(2, min(_NEW_TOKENS, recipe.evaluation.max_new_tokens))

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        prompt = _cut(_longest_prompt(space), candidates, new_tokens)
        workload = Workload(new_tokens, recipe.validation.repetitions, threads)
        write_result(measure_shown(candidates, workload, prompt), partial / LATENCY)

    places = [c.artifact.directory.relative_to(space.root).as_posix() for c in candidates]
    inputs: dict[str, Path | str] = {
        place: c.artifact.directory for place, c in zip(places, candidates, strict=True)
    }
    for name in recipe.compositions:
        inputs[f"examples of {name}"] = space.data / f"{name}.validation.jsonl"
    settings = {
        "rows": [[place, c.label] for place, c in zip(places, candidates, strict=True)],
        "new_tokens": new_tokens,
        "repetitions": recipe.validation.repetitions,
        "examples": recipe.validation.examples,
        "threads": threads,
    }
    stage(out, "latency", "latency", inputs, settings, build)
    write_result(read_result(LatencyReport, out / LATENCY), space.reports / LATENCY)


def time_one(candidates: Sequence[Candidate], prompt: list[int], threads: int) -> LatencyReport:
    """Measure what was validated from flags, and show it."""
    from caliport.show.tables import show_latency
    from caliport.validation.latency.workload import Workload

    cut = _cut(prompt, candidates, _NEW_TOKENS)
    report = measure_shown(candidates, Workload(_NEW_TOKENS, threads=threads), cut)
    show_latency(report)
    return report


def _cut(prompt: list[int], candidates: Sequence[Candidate], new_tokens: int) -> list[int]:
    """The prompt, cut so that the answer fits every artifact's context.

    The context of another tool's artifact is known once it is loaded; too short a one is an error.
    """
    known = [c.artifact.context for c in candidates if c.artifact.context is not None]
    rooms = [context - new_tokens for context in known]
    return prompt[: max(1, min(rooms, default=len(prompt)))]


def _longest_prompt(space: Workspace) -> list[int]:
    from caliport.core.checkpoints import encode_prompt, load_tokenizer

    tokenizer = load_tokenizer(space.base)
    return max(
        (
            encode_prompt(tokenizer, template.replace("{input}", example.input))
            for name in space.recipe.compositions
            for template in [prompt_of(space.recipe, name, best_method(space, name))]
            for example in reported(space, name, space.recipe.validation.examples)
        ),
        key=len,
    )


def measure_shown(
    candidates: Sequence[Candidate], workload: Workload, prompt: list[int]
) -> LatencyReport:
    """Measure with a bar on the terminal, and warn where the machine was too noisy."""
    from caliport.validation.latency.measure import measure

    with progress("latency", len(candidates) * workload.repetitions) as advance:
        report = measure(candidates, workload, prompt, advance)
    for line in noise_of(report):
        console.print(Text(f"latency: too noisy to say: {line}", "yellow"))
    return report


def noise_of(report: LatencyReport) -> list[str]:
    """What was too noisy to compare, and what else the machine did then; nothing if nothing was."""
    conditions = report.conditions
    lines = [
        f"{r.composition} {r.runtime} {r.form}: {r.noise}" for r in report.artifacts if r.noise
    ]
    if conditions is None:  # on a device
        return lines
    if conditions.noise is not None:
        lines = [conditions.noise]
    if lines:
        seen = f"other processes kept {conditions.others:.1f} cores busy"
        if conditions.load_average is not None:
            seen += f", load average {conditions.load_average:.1f} before"
        if conditions.steal is not None:
            seen += f", {conditions.steal:.1%} of the cores' time stolen"
        lines.append(seen)
    return lines
