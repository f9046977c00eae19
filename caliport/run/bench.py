"""Time and memory of artifacts, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from caliport.core.directories import read_manifest
from caliport.core.progress import console, progress
from caliport.recipe.schema import prompt_of
from caliport.run.resolve import best_method, examples_of
from caliport.run.workspace import Workspace
from caliport.stages.stage import stage

if TYPE_CHECKING:
    from caliport.validation.latency.measure import Course, Subject
    from caliport.validation.records.latency import LatencyReport

_NEW_TOKENS = 32


def bench(
    artifacts: Sequence[Path],
    prompt_tokens: int,
    new_tokens: int,
    repetitions: int,
    threads: int | None,
    out: Path | None,
) -> None:
    """Measure any artifacts together and show them against the first.

    Args:
        artifacts: Their directories; of a bundle its base and every composition are measured.
        prompt_tokens: Of the prompt.
        new_tokens: To write.
        repetitions: Rounds of turns.
        threads: Of the runtime; None for as many as cores may be used.
        out: Where to write ``latency.json`` and the report, or None.

    Raises:
        InputError: See ``caliport.validation.latency.measure.measure``.
    """
    from caliport.show.tables import show_latency
    from caliport.validation.latency.measure import Course, prompt_of
    from caliport.validation.records.reports import LATENCY, this_machine, write_result
    from caliport.validation.report.page import write_report

    names = [artifact.name for artifact in artifacts]
    subjects = [
        subject
        for path in artifacts
        for subject in parts_of(path, path.name if names.count(path.name) == 1 else str(path))
    ]
    threads = threads or this_machine().cores
    course = Course(prompt_of(prompt_tokens), new_tokens, repetitions, threads)
    report = measured(subjects, course)
    show_latency(report)
    if out is not None:
        write_result(report, out / LATENCY)
        print(f"report: {write_report(out)}")


def parts_of(directory: Path, name: str) -> Iterator[Subject]:
    """What can be measured of a directory: the artifact; of a bundle its base and compositions.

    Raises:
        InputError: No artifact there.
    """
    from caliport.validation.artifact import compositions_of
    from caliport.validation.latency.measure import Subject

    yield Subject(directory, name)
    for composition in compositions_of(directory) or ():
        yield Subject(directory, f"{name}: {composition}", composition)


def time_all(space: Workspace, subjects: Sequence[Subject], threads: int) -> None:
    """Measure all artifacts of a recipe together into its reports, anew if any of them changed.

    Every artifact reads the longest validation prompt, cut where its answer needs the room.
    """
    from caliport.validation.latency.measure import Course
    from caliport.validation.records.latency import LatencyReport
    from caliport.validation.records.reports import LATENCY, read_result, write_result

    recipe, out = space.recipe, space.kept("latency")
    new_tokens = max(2, min(_NEW_TOKENS, recipe.evaluation.max_new_tokens))

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        prompt = _cut(_longest_prompt(space), subjects, new_tokens)
        course = Course(prompt, new_tokens, recipe.validation.repetitions, threads)
        write_result(measured(subjects, course), partial / LATENCY)

    places = [subject.directory.relative_to(space.root).as_posix() for subject in subjects]
    inputs: dict[str, Path | str] = {
        place: subject.directory for place, subject in zip(places, subjects, strict=True)
    }
    for name in recipe.compositions:
        inputs[f"examples of {name}"] = space.data / f"{name}.validation.jsonl"
    settings = {
        "rows": [[place, s.composition] for place, s in zip(places, subjects, strict=True)],
        "new_tokens": new_tokens,
        "repetitions": recipe.validation.repetitions,
        "examples": recipe.validation.examples,
        "threads": threads,
    }
    stage(out, "latency", "latency", inputs, settings, build)
    write_result(read_result(LatencyReport, out / LATENCY), space.reports / LATENCY)


def time_one(subjects: Sequence[Subject], prompt: list[int], threads: int) -> LatencyReport:
    """Measure what was validated from flags, and show it."""
    from caliport.show.tables import show_latency
    from caliport.validation.latency.measure import REPETITIONS, Course

    cut = _cut(prompt, subjects, _NEW_TOKENS)
    report = measured(subjects, Course(cut, _NEW_TOKENS, REPETITIONS, threads))
    show_latency(report)
    return report


def _cut(prompt: list[int], subjects: Sequence[Subject], new_tokens: int) -> list[int]:
    """The prompt without what would leave no room for the answer in some artifact's context.

    What another tool's artifact has room for is known once it is loaded; too little is an error.
    """
    from caliport.validation.artifact import is_foreign

    known = [read_manifest(s.directory) for s in subjects if not is_foreign(s.directory)]
    rooms = [int(manifest["context"]) - new_tokens for manifest in known]
    return prompt[: max(1, min(rooms, default=len(prompt)))]


def _longest_prompt(space: Workspace) -> list[int]:
    from caliport.core.checkpoints import encode_prompt, load_tokenizer

    tokenizer = load_tokenizer(space.base)
    return max(
        (
            encode_prompt(tokenizer, template.replace("{input}", example.input))
            for name in space.recipe.compositions
            for template in [prompt_of(space.recipe, name, best_method(space, name))]
            for example in examples_of(space, name, "validation", space.recipe.validation.examples)
        ),
        key=len,
    )


def measured(subjects: Sequence[Subject], course: Course) -> LatencyReport:
    """Measure with a bar on the terminal, and warn where the machine was too noisy."""
    from caliport.validation.latency.measure import measure

    with progress("latency", len(subjects) * course.repetitions) as advance:
        report = measure(subjects, course, advance)
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
