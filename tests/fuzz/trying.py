"""Make a case from its name and try it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from tests.fuzz.calls import write_words
from tests.fuzz.cases import MAKES
from tests.fuzz.judge import Asked, Ended, listing, server, verdict, wrong_result
from tests.fuzz.mutate import SECRET
from tests.fuzz.seeds import COMMANDS, start
from tests.fuzz.table import TABLE

_OF_LIBRARIES = (".ses", "adb.", "torchinductor_")
"""What ONNX Runtime, adb and torch keep among temporary files, whoever runs them."""


@dataclass(frozen=True)
class Trial:
    """A case, how it ended, and what was not as promised; None if nothing."""

    asked: Asked
    ended: Ended
    bad: str | None


def ready(seeds: Path) -> None:
    """Make the seeds, unless they are there."""
    if (seeds / "whole").exists():
        return
    shutil.rmtree(seeds, ignore_errors=True)
    start(seeds)
    write_words(seeds)
    _warm(seeds)
    for command in COMMANDS:
        with tempfile.TemporaryDirectory() as spare:
            ended = server().run(command, seeds, Path(spare))
        assert ended.code == 0, (command, ended)
    shutil.copytree(seeds / "runs/tiny/reports", seeds / "sound")
    (seeds / "whole").touch()


@cache
def _warm(seeds: Path) -> None:
    server().ask(warm=str(seeds.resolve()))


def forget() -> None:
    """End this process's server; the next trial starts another."""
    server.cache_clear()
    _warm.cache_clear()


def trial(name: str, seeds: Path, kept: Path | None = None) -> Trial:
    """Try a case.

    Args:
        name: ``KIND:NUMBER``.
        seeds: What ``ready`` made.
        kept: Where to leave its directory; None for nowhere.
    """
    _warm(seeds)
    with _place(kept) as place, tempfile.TemporaryDirectory() as spare:
        work = place / "up/up/work"
        shutil.copytree(seeds, work)
        outside = work.parent / "outside"
        outside.mkdir()
        (outside / "secret").write_text(SECRET)
        kind, _, number = name.partition(":")
        if kind == "table":
            asked = TABLE[int(number)].make(work)
        else:
            asked = MAKES[kind](Random(name), work)
        before = listing(work.parent)
        ended = server().run(asked.arguments, work, Path(spare))
        after = listing(work.parent)
        bad = verdict(asked, ended, before, after)
        if bad is None and ended.code == 0:
            bad = wrong_result(work.parent, before, after)
        left = [n for n in os.listdir(Path(spare, "tmp")) if not n.startswith(_OF_LIBRARIES)]
        if bad is None and left:
            bad = f"left {', '.join(left)[:100]} among temporary files"
        return Trial(asked, ended, bad)


@contextmanager
def _place(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)
