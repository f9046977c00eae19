"""What a long export shows: its stage, how far it is, and the memory it holds."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from caliport.core import progress
from caliport.core.progress import PlainConsole, at, working


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120)
    monkeypatch.setattr(progress, "console", console)
    with working("onnx int4"):
        at("quantizing", 3, 16)
        console.print("line")  # draws the bar anew
        at("serializing")
        console.print("line")
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_stage_layer_and_memory_show_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, terminal=True)
    assert re.search(r"onnx int4: quantizing +3/16 +0:00:00 +\d+\.\d GB in memory", text)
    assert re.search(r"onnx int4: serializing +0:00:00", text)


def test_logs_stay_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, terminal=False).split() == ["line", "line"]


@pytest.mark.parametrize("total", [None, 16])
def test_a_log_is_told_what_is_done_and_what_is_left(
    total: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, width=120))
    monkeypatch.setattr(progress, "_EVERY", 0.01)
    with progress.progress("validating", total) as advance:
        if total is None:
            at("reading prompts", 3, 16)
        else:
            advance(3, "reading prompts")
        time.sleep(0.2)
    assert "validating: reading prompts, 3 of 16, 0 s" in stream.getvalue()


def test_stages_may_be_named_where_nothing_shows_them() -> None:
    at("quantizing", 3, 16)


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """No markup in them, no emoji codes and no control characters."""
    table = Table("name")
    table.add_row("[/red] :smile: \x1b[2J")
    table.add_row(Text("styled", "red"))
    console = PlainConsole(width=60)
    console.print(table)
    console.print("[bold]a[/bold]\n\x1b]0;owned\x07")
    shown = capsys.readouterr().out
    assert "[/red] :smile: \\x1b[2J" in shown
    assert "[bold]a[/bold]\n\\x1b]0;owned\\x07" in shown
    assert "\x1b" not in shown
