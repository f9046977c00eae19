"""The table in the documentation is that of the faults that are tested."""

from __future__ import annotations

from pathlib import Path

from tests.faults.making import EXPORT
from tests.faults.table import FAULTS

PAGE = Path(__file__).parents[2] / "docs" / "validation.md"


def test_the_documented_table_has_every_fault_and_what_is_said_of_it() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    found = {row[0]: row[1:] for row in rows if len(row) == 3 + len(EXPORT)}
    for fault in FAULTS:
        stage, precision, *gates = found[fault.name]
        assert (stage, precision) == (fault.stage, fault.precision)
        for gate in gates:
            named = gate.partition(", named ")[2] or fault.stage
            assert named == fault.named


def test_there_are_enough_and_nearly_all_are_named_rightly() -> None:
    assert len({fault.name for fault in FAULTS}) >= 25
    assert sum(fault.named == fault.stage for fault in FAULTS) >= len(FAULTS) - 1
