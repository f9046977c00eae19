"""What the commands share that take a recipe, or the flags that stand for one."""

from __future__ import annotations

from pathlib import Path

import typer

from caliport.core.errors import InputError


def show_report(reports: Path, validated: Path | None = None) -> None:
    """Write and show the report; if a recipe was ``validated``, also publish it to a CI job."""
    from caliport.show.github import publish_run
    from caliport.show.tables import show_tables
    from caliport.validation.report.page import write_report

    page = write_report(reports)
    show_tables(reports)
    print(f"report: {page}")
    if validated is not None:
        publish_run(reports, validated)


def only_main() -> None:
    """End every process except the main one: the following stages run in one process."""
    from caliport.core.processes import is_main

    if not is_main():
        raise typer.Exit(0)


def check_there(path: Path, expected: str) -> None:
    """Refuse a path that does not exist; ``expected`` says what should be there."""
    if not path.exists():
        raise InputError(f"{path}: no such file or directory, expected {expected}")
