"""A hundred bad inputs, the same each time; ``make fuzz`` tries thousands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.cases import MAKES
from tests.fuzz.judge import Asked, Ended, verdict
from tests.fuzz.table import TABLE
from tests.fuzz.trying import ready, trial

EACH = 4
FIRST = 10_000  # of a kind; the long run begins at 0
EVERY = 8  # of the table; the long run tries all


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fuzz") / "seeds"
    ready(place)
    return place


def bad(names: list[str], seeds: Path) -> list[str]:
    """What is not as promised of some cases."""
    found = {name: trial(name, seeds) for name in names}
    return [
        f"{name}: {one.bad}; {one.asked.what}; {' '.join(one.asked.arguments)[:300]}"
        for name, one in found.items()
        if one.bad is not None
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(MAKES))
def test_bad_input_ends_as_promised(kind: str, seeds: Path) -> None:
    assert bad([f"{kind}:{FIRST + n}" for n in range(EACH)], seeds) == []


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, EVERY * EVERY, EVERY))
def test_what_once_ended_badly(first: int, seeds: Path) -> None:
    numbers = range(first, len(TABLE), EVERY * EVERY)
    assert bad([f"table:{number}" for number in numbers], seeds) == []


@pytest.mark.parametrize(
    ("ended", "says"),
    [
        (Ended(2, 1, 1, "", "caliport: out: is a file\n"), None),
        (Ended(2, 1, 1, "", ""), "0 lines of error"),
        (Ended(2, 1, 1, "", "warning\ncaliport: x\n"), "2 lines of error"),
        (Ended(2, 1, 1, "", "caliport: " + "x" * 3000), "a line of 3010"),
        (Ended(2, 1, 1, "", "caliport: \x1b[2J\n"), "control character"),
        (Ended(3, 1, 1, "", "caliport: internal error: KeyError\n"), "exit 3"),
        (Ended(1, 1, 1, "", "Traceback (most recent call last)\n"), "traceback"),
        (Ended(1, 1, 1, "", ""), "exit 1"),
        (Ended(0, 1, 1, "", ""), "accepted"),
        (Ended(0, 1, 3 * 10**9, "", ""), "3.0 GB"),
        (Ended(-11, 1, 1, "", ""), "killed by SIGSEGV"),
        (Ended(-9, 90, 1, "", ""), "hangs"),
    ],
)
def test_the_judge(ended: Ended, says: str | None) -> None:
    found = verdict(Asked([], "", refused=True), ended, {}, {})
    assert found is None if says is None else says in str(found)


def test_the_judge_sees_what_is_left_and_what_is_written_elsewhere() -> None:
    refused, done = Ended(2, 1, 1, "", "caliport: x\n"), Ended(0, 1, 1, "", "")
    before, out, other = {"work/a": (1,)}, {"work/a": (1,), "work/out/b": (2,)}, {"work/a": (3,)}
    assert "left or changed" in str(verdict(Asked([], ""), refused, before, out))
    assert verdict(Asked([], ""), done, before, out) is None
    assert "wrote work/a" in str(verdict(Asked([], ""), done, before, other))
    leads, there = Asked([], "", writes=("a/b",)), {"work/a": (1,), "work/a/b": (1,)}
    assert verdict(leads, done, {}, there) is None
    assert "wrote work/a/c" in str(verdict(leads, done, {}, {**there, "work/a/c": (1,)}))
