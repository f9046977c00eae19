"""The JSON Lines form of examples: what is written reads back, and every error names its line."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caliport.core.errors import InputError
from caliport.data.examples import Example, read_jsonl, write_jsonl

TEXT = st.text(st.characters(codec="utf-8"), max_size=30)


@settings(deadline=None, max_examples=30)
@given(rows=st.lists(st.builds(Example, TEXT, TEXT), min_size=1, max_size=5))
def test_written_examples_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Example]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_jsonl(path, rows)
    assert read_jsonl(path) == rows


def test_blank_lines_byte_order_mark_and_further_fields_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"input": "a", "output": "b", "id": 3}\r\n\n')
    assert read_jsonl(path) == [Example("a", "b")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", 'line 1: the file has no examples; write at least one line such as {"input"'),
        (b"\n \n", "line 1: the file has no examples"),
        (b'{"input": "a", "output": "\xff"}', "line 1: found byte 0xff at column 27, which is not"),
        (b'{"input": "a", "output": "b"}\n{"input": "a"}', 'line 2: found no field "output"; add'),
        (b'{"output": "b"}', 'line 1: found no field "input"; add "input" with a string'),
        (b'{"input": 3, "output": "b"}', 'line 1: found a number in field "input"; write a string'),
        (b'{"input": "a", "output": null}', 'line 1: found a null in field "output"; write a'),
        (b'{"input": true, "output": ""}', 'line 1: found a boolean in field "input"'),
        (b'["a", "b"]', "line 1: found a JSON array; write an object such as"),
        (b"a,b", "line 1: found text that is not JSON"),
        (b"[" * 100_000, "line 1: found text that is not JSON"),
    ],
)
def test_errors_are_one_line_with_file_and_line(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}, {expected}")
    assert "\n" not in str(caught.value)


def test_missing_file_and_unwritable_path_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl: cannot be read \(No such file"):
        read_jsonl(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match=r"rows\.jsonl: cannot be written \(No such file"):
        write_jsonl(tmp_path / "missing" / "rows.jsonl", [])


def test_lone_surrogate_is_refused_before_the_file_exists(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(InputError, match="lone surrogate"):
        write_jsonl(path, [Example("\ud800", "")])
    assert not path.exists()
