"""The commands ``audit`` and ``sensitivity``: what to know before anything is made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from caliport.cli.options import AnyBase, BaseOption, CalibrationTokens, Prompt
from caliport.core.errors import InputError


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(audit)
    app.command()(sensitivity)


def audit(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER ADAPTER...", help="PEFT LoRA directories.")
    ],
    weight: Annotated[
        list[float] | None,
        typer.Option(help="Weight of an adapter in the sum, once for each; default equal."),
    ] = None,
    any_base: AnyBase = False,
    base: BaseOption = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            help="With --base: examples of an adapter's own task, once for each, in their order: "
            "JSON Lines with `input` and `output`.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write audit.json and the report here.")
    ] = None,
) -> None:
    """Show what adapters have in common, and how far each merge is from their sum."""
    from caliport.run.audit import audit_adapters

    if (base is None) != (not data):
        raise InputError("--base and --data go together: to score adapters on their own tasks")
    own = (base, data) if base is not None and data else None
    audit_adapters(adapters, weight, out, any_base, own)


def sensitivity(
    base: Annotated[Path, typer.Option(help="A Hugging Face directory or .gguf file.")],
    adapter: Annotated[Path | None, typer.Option("--adapter", help="PEFT LoRA directory.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSON Lines with `input` and `output`; default a built-in set."),
    ] = None,
    prompt: Prompt = None,
    share: Annotated[
        float,
        typer.Option(help="Bytes to spend on 8-bit layers, relative to all layers in 4 bits."),
    ] = 0.05,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Measure after rounding that is calibrated on this text."),
    ] = None,
    calibration_tokens: CalibrationTokens = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write a JSON file.")] = None,
) -> None:
    """Show what each linear layer loses at 4 bits and which to keep at 8."""
    from caliport.core.prompts import recorded_prompt
    from caliport.flags.export import text_for
    from caliport.flags.sensitivity import show_sensitivity

    files = [] if calibration is None else [str(calibration)]
    recorded = None if adapter is None else recorded_prompt(adapter)
    text = text_for(files, calibration_tokens, recorded, None)
    show_sensitivity(base, adapter, prompts, prompt, share, out, text)
