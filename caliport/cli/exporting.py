"""The command ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from caliport.cli.options import (
    Adapter,
    BaseOption,
    Bundle,
    CalibrationFiles,
    CalibrationTokens,
    ForceOption,
    MaxSize,
    Out,
    Overrides,
    Recipe,
    Runs,
    Share,
    TargetKl,
    alone_in,
    needed,
    no_flags,
)
from caliport.core.errors import InputError


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(export)


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
    calibration: CalibrationFiles = None,
    calibration_tokens: CalibrationTokens = None,
    tune_norms: Annotated[
        bool,
        typer.Option(
            "--tune-norms",
            help="Also tune the gains of normalizations to the integers; needs --calibration, and "
            "memory for three copies of the model in float32.",
        ),
    ] = False,
    max_size: MaxSize = None,
    target_kl: TargetKl = None,
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

        no_flags(base=base, adapter=adapter, runtime=runtime, context=context, out=out)
        no_flags(**{"push-to-hub": push_to_hub, "private": private})
        no_flags(**{"int8-layer": int8_layer, "embedding-bits": embedding_bits})
        no_flags(**{"cache-bits": cache_bits})
        no_flags(bundle=bundle, share=share, into=into, quantizer=quantizer)
        no_flags(**{"calibration": calibration, "calibration-tokens": calibration_tokens})
        no_flags(**{"max-size": max_size, "target-kl": target_kl})
        no_flags(**{"tune-norms": tune_norms})
        with alone_in(recipe, overrides, runs) as space:
            export_all(space, preflight=preflight)
        return
    if into is not None:
        from caliport.flags.export import add_to_bundle

        if any((base, adapter, runtime, out, share)):
            raise InputError("--into only goes with --bundle NAME=DIR")
        (added,) = needed(bundle=bundle)
        add_to_bundle(into, added)
        return
    from caliport.core.prompts import recorded_prompt
    from caliport.export.quantization.choices import Quantization
    from caliport.export.quantization.quantizers.registry import CALIBRATED
    from caliport.export.request import Request
    from caliport.flags.export import bundle_for, export_one, goal_for, text_for

    base, runtime, target = needed(base=base, runtime=runtime, out=out)
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
    layers = tuple(int8_layer or ())
    how = Quantization(precision, layers, embedding_bits, cache_bits, rounding, tune_norms)
    goal = goal_for(max_size, target_kl)
    request = Request(base, runtime, how, context, adapter, beside, text, goal)
    export_one(request, target, preflight=preflight, repo_id=push_to_hub, private=private)
