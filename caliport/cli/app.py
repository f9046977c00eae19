"""The command line's main commands; each imports heavy libraries only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from caliport.cli.calibrate import register as register_calibrate
from caliport.cli.compare import register
from caliport.cli.exporting import register as register_exporting
from caliport.cli.inspect import register as register_inspecting
from caliport.cli.on_device.device import register as register_on_device
from caliport.cli.on_device.devices import register as register_devices
from caliport.cli.on_device.emulator import register as register_emulators
from caliport.cli.on_device.runner import register as register_runner
from caliport.cli.once import take_options_once
from caliport.cli.options import (
    Adapter,
    BaselineOption,
    BaseOption,
    Bundle,
    DeviceOption,
    ForceOption,
    NeededRecipe,
    Overrides,
    Prompt,
    Runs,
    Share,
    alone_in,
    needed,
    no_flags,
    space_of,
    with_baseline,
)
from caliport.cli.recipes import check_there, only_main, show_report
from caliport.cli.starting import register as register_starting
from caliport.core.errors import InputError

app = typer.Typer(
    name="caliport",
    help="Compose LoRA adapters for phones: calibrate the merge, export to ExecuTorch and ONNX, "
    "check that accuracy survived.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options for every command; ``main`` itself reads ``--debug`` from the arguments."""


@app.command()
def run(
    recipe: NeededRecipe,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    baseline: BaselineOption = None,
    force: ForceOption = False,
) -> None:
    """Run all stages of a recipe, skipping those that are up to date."""
    from caliport.run.compose import compose_all
    from caliport.run.export import export_all
    from caliport.run.score import score_all
    from caliport.run.validate import check_baseline, validate_all

    with alone_in(recipe, with_baseline(overrides, baseline), runs) as space:
        check_baseline(space)
        compose_all(space)
        score_all(space)
        only_main()
        export_all(space)
        passed = validate_all(space)
        show_report(space.reports, recipe)
    raise typer.Exit(0 if passed else 1)


register_calibrate(app)
register_exporting(app)


@app.command()
def validate(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE|ARTIFACT_DIR", help="A recipe or an artifact.")
    ],
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    base: BaseOption = None,
    adapter: Adapter = None,
    bundle: Bundle = None,
    share: Share = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSON Lines with `input` and `output`; default a built-in set."),
    ] = None,
    prompt: Prompt = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the runtime.", min=1)] = None,
    precision: Annotated[
        str | None, typer.Option(help="Precision, if another tool made the artifact.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Another artifact to use as the reference in place of fp32."),
    ] = None,
    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", help="Also measure latency and memory.")
    ] = True,
    runner: Annotated[
        str | None,
        typer.Option(help="plain (default), genai (onnxruntime-genai) or MODULE:FUNCTION."),
    ] = None,
    against_runner: Annotated[
        str | None, typer.Option(help="Like --runner, for the artifact of --against.")
    ] = None,
    by_layer: Annotated[
        bool, typer.Option("--by-layer", help="Also show the error budget by layer.")
    ] = False,
    baseline: BaselineOption = None,
    device: DeviceOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the reports here.")] = None,
) -> None:
    """Compare artifacts with eager PyTorch; exit code 1 if a gate fails."""
    check_there(recipe, "a recipe or an artifact directory")
    if recipe.is_dir():
        from caliport.export.artifact import Artifact
        from caliport.flags.named import bundle_of
        from caliport.flags.validate import read_prompts, validate_one
        from caliport.validation.api import Options, Validation
        from caliport.validation.records.reports import check_reports

        if out is not None:
            check_reports(out)
        if device:
            raise InputError("--device goes with a recipe; see caliport device validate")
        (base,) = needed(base=base)
        options = Options(
            threads=threads,
            runner=runner or "plain",
            precision=precision,
            against=None if against is None else Artifact.read(against),
            against_runner=against_runner or "plain",
            by_layer=by_layer,
            prompt=prompt,
        )
        parts, (texts, places) = bundle_of(bundle, share), read_prompts(prompts, prompt)
        asked = Validation(Artifact.read(recipe), base, adapter, parts, texts, options, places)
        passed = validate_one(asked, out, latency=latency, baseline=baseline)
    else:
        from caliport.run.validate import validate_all

        no_flags(base=base, adapter=adapter, bundle=bundle, share=share)
        no_flags(prompts=prompts, out=out, precision=precision, against=against)
        no_flags(**{"against-runner": against_runner})
        if runner is not None:
            overrides = [*(overrides or ()), f"validation.runner={runner}"]
        layers = ["validation.by_layer=true"] if by_layer else []
        with alone_in(recipe, [*with_baseline(overrides, baseline), *layers], runs) as space:
            passed = validate_all(space, latency=latency)
            if device:
                from caliport.on_devices.validate import validate_rows

                passed = validate_rows(space, device) and passed
            show_report(space.reports, recipe)
    raise typer.Exit(0 if passed else 1)


@app.command()
def report(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE|RUN_DIR", help="A recipe or a run directory.")
    ],
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
) -> None:
    """Rewrite the HTML report from a run's measurements."""
    check_there(recipe, "a recipe or a run directory")
    run_dir = recipe if recipe.is_dir() else space_of(recipe, overrides, runs).root
    reports = run_dir / "reports"
    if not reports.is_dir():
        raise InputError(f"{run_dir}: has no reports; expected a run directory")
    show_report(reports)


register_starting(app)
register(app)
register_inspecting(app)
register_devices(app)
register_on_device(app)
register_emulators(app)
register_runner(app)
take_options_once(app)
