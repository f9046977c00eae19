"""One look for every progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from caliport_core.processes import is_main

console = Console(stderr=True, quiet=not is_main())

Advance = Callable[[int, str], None]
"""Called with the number of units done so far and a short note, such as the current loss."""


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Advance]:
    """Show a bar (a spinner when ``total`` is None) while the body runs, on a terminal only.

    Yields a function that takes the number of units done so far and a short note.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=console.quiet or not console.is_terminal
    ) as bars:
        task = bars.add_task(title, total=total, note="")

        def advance(done: int, note: str = "") -> None:
            bars.update(task, completed=done, note=note)

        yield advance
