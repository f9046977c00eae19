"""Progress bars and status lines, all in one style."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from caliport.core.errors import printable
from caliport.core.processes import is_main


class PlainConsole(Console):
    """A console that shows strings as they are: no markup in them, and nothing unprintable.

    Names of files, adapters and devices may come from strangers. Use ``rich.text.Text`` for style.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a string without markup, emoji codes and control characters."""
        return super().render_str(_plain(text), **{**options, "markup": False, "emoji": False})

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render anything, such as a ``Text`` in a table, without control characters."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(_plain(segment.text), segment.style)


def _plain(text: str) -> str:
    return "\n".join(printable(line, len(line) + 1) for line in text.split("\n"))


console = PlainConsole(stderr=True, quiet=not is_main())

Advance = Callable[[int, str], None]
"""Called with the number of units done so far and a short note, such as the loss."""


_Show = Callable[[str, int, int | None], None]
_shown: ContextVar[_Show | None] = ContextVar("shown", default=None)


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Advance]:
    """Show a bar (a spinner when ``total`` is None) while the body runs, on a terminal only.

    Yields a function that takes the number of units done so far and a short note.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(
        *columns, console=console, transient=True, disable=console.quiet or not console.is_terminal
    ) as bars:
        task = bars.add_task(title, total=total, note="")

        def advance(done: int, note: str = "") -> None:
            bars.update(task, completed=done, note=note)

        yield advance


@contextmanager
def working(title: str) -> Iterator[None]:
    """Show the stage set by ``at``, elapsed time and this process's memory while the body runs."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}: {task.fields[stage]}", markup=False),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        MemoryColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=console.quiet or not console.is_terminal
    ) as bars:
        task = bars.add_task(title, total=None, stage="", count="")

        def show(stage: str, done: int, total: int | None) -> None:
            count = "" if total is None else f"{done}/{total}"
            bars.update(task, stage=stage, count=count, refresh=True)

        token = _shown.set(show)
        try:
            yield
        finally:
            _shown.reset(token)


def at(stage: str, done: int = 0, total: int | None = None) -> None:
    """Report the stage that has begun and, if it has parts, how many of them are done.

    The enclosing ``working`` shows it; without one, nothing happens.

        at("quantizing, layer", 3, 16)
    """
    show = _shown.get()
    if show is not None:
        show(stage, done, total)


class MemoryColumn(ProgressColumn):
    """Resident memory of this process, updated twice a second."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """Format the memory, such as ``1.2 GB in memory``."""
        import psutil

        return Text(f"{psutil.Process().memory_info().rss / 1e9:.1f} GB in memory")
