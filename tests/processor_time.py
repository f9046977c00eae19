"""``python -m pytest -p tests.processor_time``: what uses most processor time.

Wall time says little on a machine that does other things too. Here the seconds of a test are those
of its process and of all processes below it, the living ones included. Linux only.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import pytest

_TICKS = os.sysconf("SC_CLK_TCK")
_SHOWN = 40
_spent: dict[str, float] = {}


def _now() -> float:
    """Seconds of this process and of those below it, ended or alive."""
    seconds, children = {}, defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            children[int(fields[1])].append(int(entry.name))
            seconds[int(entry.name)] = sum(map(int, fields[11:15])) / _TICKS
    below, found = [os.getpid()], 0.0
    while below:
        process = below.pop()
        found += seconds.get(process, 0.0)
        below += children[process]
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    before = _now()
    try:
        return (yield)
    finally:
        _spent[item.nodeid] = _now() - before


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    before = _now() if fixturedef.scope != "function" else 0.0
    try:
        return (yield)
    finally:
        if fixturedef.scope != "function":
            _spent[f"{request.node.nodeid}: fixture {fixturedef.argname}"] = _now() - before


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section(f"processor time: {_now():.0f} s, of which")
    for name, seconds in sorted(_spent.items(), key=lambda one: -one[1])[:_SHOWN]:
        terminalreporter.write_line(f"{seconds:8.1f} s {name}")
