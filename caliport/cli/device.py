"""XXX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from caliport.cli.options import LlamaMainOption, RunnerOption
from caliport.core.directories import MANIFEST
from caliport.core.errors import InputError
from caliport.on_devices.validate import _stages, _subject
from caliport.on_devices.where import SECONDS, Where, chosen

on_device = typer.Typer(
    help="The same proof on a device, over adb.", no_args_is_help=True, rich_markup_mode=None
)


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
    from caliport.core.progress import progress
    from caliport.data.examples import read_jsonl
    from caliport.flags.named import named
    from caliport.flags.validate import parts_of, references_of, said_precision
    from caliport.show.github import publish
    from caliport.show.tables import show_budget, show_devices, show_gates
    from caliport.validation.artifact import compositions_of
    from caliport.validation.check import METRIC, budget_of
    from caliport.validation.records.reports import (
        PARITY,
        ParityReport,
        environment,
        this_machine,
        write_result,
    )
    from caliport.validation.report.junit import write_junit
    from caliport.validation.report.page import write_report

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
