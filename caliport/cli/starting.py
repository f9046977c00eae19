"""The commands ``init`` and ``doctor``: what comes before a first run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(init)
    app.command()(doctor)


def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
    recipe: Annotated[
        str | None,
        typer.Option(help="A built-in recipe, such as llama-3.2-1b or demo."),
    ] = None,
) -> None:
    """Write a commented recipe to start from."""
    from caliport.flags.template import write_template

    write_template(path, recipe)


def doctor() -> None:
    """Show what is installed, what would not work and why; exit code 1 if anything would not."""
    from caliport.cli.doctor import examine

    raise typer.Exit(0 if examine() else 1)
