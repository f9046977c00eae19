"""Progress bars and status lines, all in one style."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event, Thread
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


_EVERY = 10.0  # seconds between two lines of a log
_Show = Callable[[str, int, int | None], None]
_shown: ContextVar[_Show | None] = ContextVar("shown", default=None)


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Advance]:
    """Show a bar (a spinner when ``total`` is None) while the body runs.

    Elsewhere than on a terminal, a line is printed every ten seconds. Yields a function that takes
    the number of units done so far and a short note; without ``total``, ``at`` gives the note.
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
        line = _Line(title, total)

        def advance(done: int, note: str = "") -> None:
            bars.update(task, completed=done, note=note)
            line.set(note, done, total)

        def show(stage: str, done: int, parts: int | None) -> None:
            bars.update(task, note=stage if parts is None else f"{stage} {done}/{parts}")
            line.set(stage, done, parts)

        token = _shown.set(show) if total is None else None
        try:
            with line.logged():
                yield advance
        finally:
            if token is not None:
                _shown.reset(token)


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
            line.set(stage, done, total)

        line = _Line(title)
        token = _shown.set(show)
        try:
            with line.logged():
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


class _Line:
    """What a log is told while something long runs: what is done, and what is left."""

    def __init__(self, title: str, total: int | None = None) -> None:
        self._title, self._note, self._done, self._total = title, "", 0, total
        self._start = time.monotonic()

    def set(self, note: str, done: int, total: int | None) -> None:
        """Note what has begun, and how many of its parts are done."""
        self._note, self._done, self._total = note, done, total

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Print a line every ten seconds while the body runs, elsewhere than on a terminal."""
        if console.quiet or console.is_terminal:
            yield
            return
        over = Event()

        def tell() -> None:
            while not over.wait(_EVERY):
                console.print(str(self), soft_wrap=True)

        thread = Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def __str__(self) -> str:
        done = "" if self._total is None else f", {self._done} of {self._total}"
        note = f": {self._note}" if self._note else ""
        return f"{self._title}{note}{done}, {time.monotonic() - self._start:.0f} s"


class MemoryColumn(ProgressColumn):
    """Resident memory of this process, updated twice a second."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """Format the memory, such as ``1.2 GB in memory``."""
        import psutil

        return Text(f"{psutil.Process().memory_info().rss / 1e9:.1f} GB in memory")
