"""``caliport device …``: artifacts on a device over adb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from caliport.cli.options import LlamaMainOption, Prompt, RunnerOption
from caliport.core.directories import MANIFEST
from caliport.on_devices.where import SECONDS, Where, chosen

on_device = typer.Typer(
    help="Run the same checks on a device, over adb.", no_args_is_help=True, rich_markup_mode=None
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
        str,
        typer.Option(
            "--base", help="Hugging Face directory, .gguf file (or hub name) of the base."
        ),
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
        typer.Option(help="A device's serial number, or 'any'; repeatable; default the only one."),
    ] = None,
    abi: Annotated[
        str | None, typer.Option(help="Use the first device with this ABI, such as arm64-v8a.")
    ] = None,
    runner: RunnerOption = None,
    llama_main: LlamaMainOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSON Lines with `input` and `output`; default a built-in set."),
    ] = None,
    prompt: Prompt = None,
    precision: Annotated[
        str | None, typer.Option(help="Precision, if another tool made the artifact.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the runtime.", min=1)] = None,
    timeout: Annotated[
        float, typer.Option(help="Longest time for one artifact, in seconds.", min=1)
    ] = SECONDS,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the reports here.")] = None,
) -> None:
    """Compare artifacts' results on a device with those here; exit code 1 if a gate fails."""
    from caliport.export.artifact import Artifact
    from caliport.export.request import Bundle
    from caliport.flags.named import bundle_of
    from caliport.flags.validate import read_prompts
    from caliport.on_devices.validate import validate_on
    from caliport.show.github import publish
    from caliport.show.tables import show_budget, show_devices, show_gates
    from caliport.validation.api import Options, Validation, write_reports
    from caliport.validation.records.reports import check_reports

    if out is not None:
        check_reports(out)
    where = Where(
        tuple(chosen([*(serial or ()), *([abi] if abi else ())])), runner or (), llama_main, timeout
    )
    parts = bundle_of(bundle, share)
    options = Options(threads=threads, precision=precision, prompt=prompt)
    asked, places = read_prompts(prompts, prompt)
    validations = [
        Validation(found, base, None, parts, asked, options, places)
        if found.is_bundle
        else Validation(found, base, adapter, Bundle({}), asked, options, places)
        for found in map(Artifact.read, artifacts)
    ]
    report, troubles = validate_on(validations, where)
    for result in report.devices:
        show_gates(result)
    for budget in report.budgets:
        show_budget(budget)
    show_devices(report)
    if out is not None:
        print(f"report: {write_reports(report, out)}")
    publish(report, [], artifacts[0] / MANIFEST, out)
    if troubles:
        raise troubles[0]
    raise typer.Exit(0 if report.passed else 1)
