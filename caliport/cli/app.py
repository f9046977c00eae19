"""The command line's main commands; each imports heavy libraries only when it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from caliport.cli.compare import register
from caliport.cli.device import register as register_on_device
from caliport.cli.devices import register as register_devices
from caliport.cli.emulator import register as register_emulators
from caliport.cli.inspect import register as register_inspecting
from caliport.cli.once import take_options_once
from caliport.cli.options import (
    Adapter,
    BaselineOption,
    BaseOption,
    Bundle,
    DeviceOption,
    ForceOption,
    NeededRecipe,
    Out,
    Overrides,
    Prompt,
    Recipe,
    Runs,
    Share,
    with_baseline,
)
from caliport.cli.runner import register as register_runner
from caliport.cli.starting import register as register_starting
from caliport.core.errors import InputError
from caliport.core.prompts import PLAIN
from caliport.recipe.methods import CORRECTED, MERGED, WEIGHTED

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

    with _alone(recipe, with_baseline(overrides, baseline), runs) as space:
        check_baseline(space)
        compose_all(space)
        score_all(space)
        _only_main()
        export_all(space)
        passed = validate_all(space)
        _show(space.reports, recipe)
    raise typer.Exit(0 if passed else 1)


@app.command()
def calibrate(
    recipe: Recipe = None,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    base: BaseOption = None,
    adapter: Annotated[
        list[Path] | None, typer.Option("--adapter", help="PEFT LoRA directory; repeatable.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(MERGED)}; {', '.join(WEIGHTED)}; {', '.join(CORRECTED)}, with "
            "variants such as lc++-per-layer or lc++-int4; flix (docs/calibrate.md)."
        ),
    ] = "lc++",
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", help="Merge weight, once for each --adapter; default equal."),
    ] = None,
    dora: Annotated[
        str | None,
        typer.Option(
            metavar="svd|svd=RANK",
            help="Replace DoRA adapters by the nearest low-rank update; default twice their rank.",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Training data: JSON Lines with `input` and `output`.")
    ] = None,
    prompt: Prompt = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of a correction.", min=1)] = 300,
    batch_size: Annotated[int, typer.Option(help="Examples per step.", min=1)] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-4,
    seed: Annotated[int, typer.Option(help="Random seed of training.")] = 0,
    rank: Annotated[
        list[str] | None,
        typer.Option("--rank", help="FLix: NAME=RANK of a feature to train; repeatable."),
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="FLix: directory of earlier features, kept frozen.")
    ] = None,
    out: Out = None,
    force: ForceOption = False,
) -> None:
    """Train a recipe's adapters, merge and calibrate them, and score every method."""
    if recipe is not None:
        from caliport.run.compose import compose_all
        from caliport.run.score import score_all

        _no_flags(
            base=base,
            adapter=adapter,
            data=data,
            prompt=prompt,
            weight=weight,
            rank=rank,
            features=features,
            out=out,
            dora=dora,
        )
        with _alone(recipe, overrides, runs) as space:
            compose_all(space)
            score_all(space)
            _only_main()
            _show(space.reports)
        return
    from caliport.flags.calibrate import calibrate_one, features_one, inputs_of
    from caliport.stages.sources import Source

    training = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    if method == "flix":
        if dora is not None:
            raise InputError("--dora goes with --adapter; flix trains its own")
        base, data, rank, target = _needed(base=base, data=data, rank=rank, out=out)
        source = Source(data, PLAIN if prompt is None else prompt)
        features_one(base, source, rank, training, features, target)
        return
    base, adapters, target = _needed(base=base, adapter=adapter, out=out)
    inputs = inputs_of(adapters, data, prompt)
    calibrate_one(base, inputs, method, training, weight or [], target, dora)


@app.command()
def export(
    recipe: Recipe = None,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    base: BaseOption = None,
    adapter: Adapter = None,
    runtime: Annotated[str | None, typer.Option(help="executorch or onnx.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, int8 or int4.")] = "fp32",
    context: Annotated[
        int | None,
        typer.Option(help="Key-value cache length in tokens; default the base's.", min=1),
    ] = None,
    bundle: Bundle = None,
    share: Share = None,
    into: Annotated[
        Path | None,
        typer.Option(help="Add the --bundle compositions to this finished onnx bundle."),
    ] = None,
    int8_layer: Annotated[
        list[str] | None,
        typer.Option(help="A layer that int4 keeps at 8 bits; repeatable; see sensitivity."),
    ] = None,
    embedding_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of the embedding with int4: 4 or 8; default a tied head's, else 8."
        ),
    ] = None,
    cache_bits: Annotated[
        int | None, typer.Option(help="8 for an int8 key-value cache, executorch only.")
    ] = None,
    quantizer: Annotated[
        str | None,
        typer.Option(
            help="How int4 is rounded: hqq needs no text, weighted and gptq do; default gptq with "
            "--calibration, else hqq."
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="Text that int4 is calibrated on: JSON Lines with `input` and `output` (.jsonl), "
            "or plain text; NAME=FILE for each composition of a bundle.",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Tokens of it to run; default 8192.", min=64)
    ] = None,
    out: Out = None,
    preflight: Annotated[
        bool,
        typer.Option("--preflight/--no-preflight", help="Stop if memory or disk is too small."),
    ] = True,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="REPO_ID", help="Upload the artifact when done."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private if it is new.")
    ] = False,
    force: ForceOption = False,
) -> None:
    """Quantize a base with adapters and lower it to .pte or .onnx."""
    if recipe is not None:
        from caliport.run.export import export_all

        _no_flags(base=base, adapter=adapter, runtime=runtime, context=context, out=out)
        _no_flags(**{"push-to-hub": push_to_hub, "private": private})
        _no_flags(**{"int8-layer": int8_layer, "embedding-bits": embedding_bits})
        _no_flags(**{"cache-bits": cache_bits})
        _no_flags(bundle=bundle, share=share, into=into, quantizer=quantizer)
        _no_flags(**{"calibration": calibration, "calibration-tokens": calibration_tokens})
        with _alone(recipe, overrides, runs) as space:
            export_all(space, preflight=preflight)
        return
    if into is not None:
        from caliport.flags.export import add_to_bundle

        if any((base, adapter, runtime, out, share)):
            raise InputError("--into only goes with --bundle NAME=DIR")
        (added,) = _needed(bundle=bundle)
        add_to_bundle(into, added)
        return
    from caliport.core.prompts import recorded_prompt
    from caliport.export.quantization.choices import Quantization
    from caliport.export.quantization.quantizers.registry import CALIBRATED
    from caliport.export.request import Request
    from caliport.flags.export import bundle_for, export_one, text_for

    base, runtime, target = _needed(base=base, runtime=runtime, out=out)
    if private and push_to_hub is None:
        raise InputError("--private only goes with --push-to-hub REPO_ID")
    if bundle and adapter is not None:
        raise InputError("--adapter does not go with --bundle; expected --share NAME=DIR")
    if share and not bundle:
        raise InputError("--share goes with --bundle NAME=DIR")
    beside = bundle_for(runtime, bundle, share or []) if bundle else None
    prompt = None if adapter is None else recorded_prompt(adapter)
    text = text_for(calibration or [], calibration_tokens, prompt, beside)
    rounding = CALIBRATED if text is not None and quantizer is None else quantizer
    how = Quantization(precision, tuple(int8_layer or ()), embedding_bits, cache_bits, rounding)
    request = Request(base, runtime, how, context, adapter, beside, text)
    export_one(request, target, preflight=preflight, repo_id=push_to_hub, private=private)


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
    _check_there(recipe, "a recipe or an artifact directory")
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
        (base,) = _needed(base=base)
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

        _no_flags(base=base, adapter=adapter, bundle=bundle, share=share)
        _no_flags(prompts=prompts, out=out, precision=precision, against=against)
        _no_flags(**{"against-runner": against_runner})
        if runner is not None:
            overrides = [*(overrides or ()), f"validation.runner={runner}"]
        layers = ["validation.by_layer=true"] if by_layer else []
        with _alone(recipe, [*with_baseline(overrides, baseline), *layers], runs) as space:
            passed = validate_all(space, latency=latency)
            if device:
                from caliport.on_devices.validate import validate_rows

                passed = validate_rows(space, device) and passed
            _show(space.reports, recipe)
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
    _check_there(recipe, "a recipe or a run directory")
    run_dir = recipe if recipe.is_dir() else _space(recipe, overrides, runs).root
    reports = run_dir / "reports"
    if not reports.is_dir():
        raise InputError(f"{run_dir}: has no reports; expected a run directory")
    _show(reports)


register_starting(app)
register(app)
register_inspecting(app)
register_devices(app)
register_on_device(app)
register_emulators(app)
register_runner(app)
take_options_once(app)


def _space(recipe: Path, overrides: list[str] | None, runs: Path) -> Any:
    from caliport.recipe.read import read_recipe
    from caliport.run.workspace import Workspace
    from caliport.validation.records.reports import check_reports

    found = read_recipe(recipe, overrides or [])
    space = Workspace(found, runs / found.name)
    check_reports(space.reports)
    return space


@contextmanager
def _alone(recipe: Path, overrides: list[str] | None, runs: Path) -> Iterator[Any]:
    """The paths of a recipe's run, in which no other process works while the body runs."""
    from caliport.core.outputs import within_run
    from caliport.core.processes import alone, is_main

    space = _space(recipe, overrides, runs)
    lock = alone(space.root, inside=True) if is_main() else nullcontext()
    with lock, within_run(space.root):
        yield space


def _show(reports: Path, validated: Path | None = None) -> None:
    """Write and show the report; if a recipe was ``validated``, also publish it to a CI job."""
    from caliport.show.github import publish_run
    from caliport.show.tables import show_tables
    from caliport.validation.report.page import write_report

    page = write_report(reports)
    show_tables(reports)
    print(f"report: {page}")
    if validated is not None:
        publish_run(reports, validated)


def _only_main() -> None:
    """End every process except the main one: the following stages run in one process."""
    from caliport.core.processes import is_main

    if not is_main():
        raise typer.Exit(0)


def _check_there(path: Path, expected: str) -> None:
    if not path.exists():
        raise InputError(f"{path}: no such file or directory, expected {expected}")


def _needed(**flags: Any) -> tuple[Any, ...]:
    for name, value in flags.items():
        if value is None or value == []:
            raise InputError(f"--{name} is missing; use it, or a recipe (see --help)")
    return tuple(flags.values())


def _no_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if value:
            raise InputError(f"--{name} does not go with a recipe; use --set FIELD=VALUE")
