"""The command ``device``, and what ``--device`` means elsewhere: the same proof over adb."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caliport.devices_named import SECONDS, Where, chosen
from caliport_core.directories import MANIFEST
from caliport_core.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from android_harness.parity import Subject
    from caliport.devices_named import Held
    from caliport.references import References
    from caliport.workspace import Workspace
    from validation.budget_results import BudgetStage
    from validation.device_results import DeviceResult
    from validation.evaluation import Answers
    from validation.rounding import Expected

_THREADS = 4  # the fast cores of most phones

on_device = typer.Typer(
    help="The same proof on a device, over adb.", no_args_is_help=True, rich_markup_mode=None
)
DeviceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        metavar="SERIAL",
        help="Also on this device: a serial, 'any', or what it must be (docs/android.md); "
        "repeatable.",
    ),
]
"""Of the commands that can work on a device too."""
RunnerOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--runner",
        metavar="DIR",
        help="What caliport runner build made; repeatable; default those in build.",
    ),
]
LlamaMainOption = Annotated[
    Path | None,
    typer.Option(
        "--llama-main",
        metavar="FILE",
        help="ExecuTorch's own runner, for .pte files; default build/llama_main.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.add_typer(on_device, name="device")


@on_device.callback()
def _only() -> None:
    """Keep ``validate`` a word of its own."""


@on_device.command()
def validate(
    artifacts: Annotated[
        list[Path], typer.Argument(metavar="ARTIFACT...", help="Artifact directories.")
    ],
    base: Annotated[
        str, typer.Option("--base", help="Hugging Face directory (or hub name) of the base.")
    ],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="PEFT LoRA directory that is folded in.")
    ] = None,
    bundle: Annotated[
        list[str] | None,
        typer.Option("--bundle", metavar="NAME=DIR", help="A composition of a bundle."),
    ] = None,
    share: Annotated[
        list[str] | None,
        typer.Option("--share", metavar="NAME=DIR", help="An adapter that a bundle stores once."),
    ] = None,
    serial: Annotated[
        list[str] | None,
        typer.Option(help="Of a device, or 'any'; repeatable; default the only one."),
    ] = None,
    abi: Annotated[
        str | None, typer.Option(help="Or the first device of this ABI, such as arm64-v8a.")
    ] = None,
    runner: RunnerOption = None,
    llama_main: LlamaMainOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSON Lines with `input` and `output`; default a built-in set."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="Prompt around each input.")] = "{input}",
    precision: Annotated[
        str | None, typer.Option(help="Of an artifact of another tool: fp32, int8 or int4.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the runtime.", min=1)] = None,
    timeout: Annotated[
        float, typer.Option(help="Most seconds that an artifact may take.", min=1)
    ] = SECONDS,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the reports here.")] = None,
) -> None:
    """Hold artifacts on a device to themselves on this machine; exit code 1 if a gate fails."""
    from caliport.data.examples import read_jsonl
    from caliport.exporting import named
    from caliport.github import publish
    from caliport.single import parts_of, references_of, said_precision
    from caliport.tables import show_budget, show_devices, show_gates
    from caliport.validating import METRIC, budget_of
    from caliport_core.progress import progress
    from validation.junit import write_junit
    from validation.report import write_report
    from validation.results import (
        PARITY,
        ParityReport,
        environment,
        this_machine,
        write_result,
    )
    from validation.runner import compositions_of

    devices = chosen([*(serial or ()), *([abi] if abi else ())])
    where = Where(tuple(devices), runner or (), llama_main, timeout)
    compositions, shared = named("--bundle", bundle or ()), named("--share", share or ())
    said = {artifact: said_precision(artifact, precision, None) for artifact in artifacts}
    examples = read_jsonl(prompts) if prompts is not None else None
    results, budgets, troubles = [], [], list[InputError]()
    for artifact in artifacts:
        bundled = compositions_of(artifact) is not None
        parts, _ = parts_of(
            artifact, *((None, compositions, shared) if bundled else (adapter, {}, {}))
        )
        for label, (name, path) in parts.items():
            with progress(f"{artifact} on {where.shown}: {label}", None):
                references = references_of(base, path, shared, examples, prompt, False)
                subject = _subject(
                    artifact, references, label, METRIC, threads, name, said[artifact]
                )
                found, wrong = where.check(subject)
            results += [result for result, _ in found]
            troubles += wrong
            if found and path is not None and said[artifact] is None:
                stages = _stages(subject, references, found)
                budgets.append(budget_of(label, references, path.name, stages))
    facts: dict[str, Any] = {"machine": this_machine(), "versions": environment()}
    report = ParityReport(**facts, artifacts=[], budgets=budgets, devices=results)
    for result in results:
        show_gates(result)
    for budget in budgets:
        show_budget(budget)
    show_devices(report)
    if out is not None:
        write_result(report, out / PARITY)
        write_junit(results, out / "junit.xml")
        print(f"report: {write_report(out)}")
    publish(report, [], artifacts[0] / MANIFEST, out)
    if troubles:
        raise troubles[0]
    raise typer.Exit(0 if all(result.passed for result in results) else 1)


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
    from android_harness.parity import subject_of
    from validation.parity import NotFinite
    from validation.results import this_machine

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
    from caliport_core.directories import read_manifest
    from export.artifact import Quantization
    from validation.runner import artifact_form, compositions_of

    manifest = read_manifest(artifact)
    how, (runtime, precision) = Quantization.of(manifest), artifact_form(artifact)
    beside = compositions_of(artifact) is not None
    expected = references.expected(how, runtime, int(manifest["context"]), beside=beside)
    if (runtime, precision) != ("onnx", "int4"):
        return expected, None
    return expected, partial(references.answers, how, runtime, beside=beside, rounds="executorch")


def _stages(subject: Subject, references: References, found: Sequence[Held]) -> list[BudgetStage]:
    """The stages of an error budget from the quantized eager model to the device."""
    from export.artifact import Quantization
    from validation.budget import Step, measured

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
    from validation.budget import Step, measured

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
    from caliport.shipping import form_of
    from validation.runner import artifact_form, compositions_of

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
    from caliport.scoring import best_method
    from caliport.shipping import ALONE, rows_of
    from caliport.validating import first_logits, references_of, threads_of
    from caliport_core.progress import progress
    from validation.budget import with_stage
    from validation.junit import write_junit
    from validation.results import PARITY, ParityReport, read_result, write_result

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
