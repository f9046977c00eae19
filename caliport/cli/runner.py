"""The command ``runner``: what runs artifacts on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

runners = typer.Typer(
    help="What runs artifacts on a device.", no_args_is_help=True, rich_markup_mode=None
)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.add_typer(runners, name="runner")


@runners.callback()
def _only() -> None:
    """Keep ``build`` a word of its own."""


@runners.command()
def build(
    target: Annotated[str, typer.Option(help="host, x86_64 or aarch64 (any Linux), or android.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The directory; default build/TARGET.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Where headers and compiled parts are kept.")] = Path(
        "build/runner"
    ),
    ndk: Annotated[Path | None, typer.Option(help="Android's NDK, for android.")] = None,
    aar: Annotated[
        Path | None, typer.Option(help="onnxruntime-android-VERSION.aar, for android.")
    ] = None,
) -> None:
    """Build the ONNX runner into a directory that is pushed to a device as it is."""
    from caliport.android_harness.toolchain.build import build_runner
    from caliport.core.directories import read_manifest

    made = build_runner(target, out or Path("build") / target, cache, ndk, aar)
    command = " ".join(read_manifest(made)["command"]).replace("{runner}", str(made))
    print(f"runner: {command} {{job.json}} {{result.json}}")
