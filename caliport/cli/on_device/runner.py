"""The command ``caliport runner build``: build the ONNX runner for devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

runners = typer.Typer(
    help="Programs that run artifacts on a device.", no_args_is_help=True, rich_markup_mode=None
)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.add_typer(runners, name="runner")


@runners.callback()
def _only() -> None:
    """Keep ``build`` a subcommand, although it is the only one."""


@runners.command()
def build(
    target: Annotated[str, typer.Option(help="host, x86_64 or aarch64 (any Linux), or android.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory to write; default build/TARGET.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Directory of headers and compiled parts.")] = Path(
        "build/runner"
    ),
    ndk: Annotated[
        Path | None, typer.Option(help="Android NDK directory; only for target android.")
    ] = None,
    aar: Annotated[
        Path | None,
        typer.Option(help="onnxruntime-android-VERSION.aar; only for target android."),
    ] = None,
) -> None:
    """Build the ONNX runner into a directory that can be pushed to a device."""
    from caliport.android_harness.toolchain.build import build_runner
    from caliport.core.directories import read_manifest

    made = build_runner(target, out or Path("build") / target, cache, ndk, aar)
    command = " ".join(read_manifest(made)["command"]).replace("{runner}", str(made))
    print(f"runner: {command} {{job.json}} {{result.json}}")
