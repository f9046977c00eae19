"""``--calibration``: which file each composition is calibrated on, and how it is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from caliport.core.errors import InputError
from caliport.export.quantization.text import PlainText
from caliport.export.request import Bundle
from caliport.flags.export import text_for
from caliport.stages.sources import Source

BESIDE = Bundle({"one": Path("a"), "two": Path("b")})


def test_one_file_for_a_fold_read_by_its_name() -> None:
    found = text_for(["a.jsonl"], 100, "Say: {input}", None)
    assert found is not None
    assert found.sources == {"": Source(Path("a.jsonl"), "Say: {input}", leave_out_long=True)}
    assert found.tokens == 100
    plain = text_for(["a.txt"], None, None, None)
    assert plain is not None
    assert plain.sources == {"": PlainText(Path("a.txt"))}
    assert text_for([], None, None, None) is None


@pytest.mark.parametrize("values", [["a.txt"], ["two=a.txt", "one=a.txt"]])
def test_one_for_each_composition_of_a_bundle(values: Sequence[str]) -> None:
    found = text_for(values, None, None, BESIDE)
    assert found is not None
    assert found.sources == dict.fromkeys(("one", "two"), PlainText(Path("a.txt")))


@pytest.mark.parametrize(
    ("values", "tokens", "beside", "words"),
    [
        ([], 100, None, "--calibration-tokens goes with --calibration FILE"),
        (["a", "b"], None, None, "--calibration: found 2 files, expected one"),
        (["one=a"], None, BESIDE, "names one, expected one file for each of one, two"),
        (["a", "b"], None, BESIDE, "found 'a', expected NAME=DIR"),
    ],
)
def test_files_that_do_not_fit(
    values: Sequence[str], tokens: int | None, beside: Bundle | None, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        text_for(values, tokens, None, beside)
