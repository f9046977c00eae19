"""The example at the end of a run: printable, and with artifacts that were asked the same."""

from __future__ import annotations

import pytest

from caliport.show.example import show_example
from caliport.validation.records.reports import ParitySample
from tests.validation.examples import ATTACK, artifact, gate, parity, quality


def shown(capsys: pytest.CaptureFixture[str], asked: str) -> str:
    sample = ParitySample(input=asked, reference="Ein Mann.", fp32="a", artifact="Ein Hund")
    one = artifact("onnx", "int4", [gate("prefill", "lowering")])
    one = one.model_copy(update={"samples": (sample,)})
    show_example(quality(), parity().model_copy(update={"artifacts": [one]}))
    return capsys.readouterr().out


def test_what_each_wrote_of_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(capsys, f"Do: {ATTACK}")
    for head in ("asked", "expected", "Linear merge", "LC++", "onnx int4"):
        assert f"\n  {head}\n" in said
    assert "    Ein Hund\n" in said
    assert not {c for c in said if not c.isprintable() and c != "\n"}


def test_an_artifact_that_was_asked_something_else_is_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "onnx int4" not in shown(capsys, "another")
