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
    rows = [*rows, Example("some text", "")]
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
        (
            b'{"input": "a", "output": "b"}\n{"input": "a"}',
            """line 2: found no field "output", only 'input'; add""",
        ),
        (b'{"output": "b"}', """line 1: found no field "input", only 'output'; add "input" with"""),
        (b"{}", 'line 1: found no field "input"; add'),
        (b'{"input": 3, "output": "b"}', 'line 1: found a number in field "input"; write a string'),
        (b'{"input": "a", "output": null}', 'line 1: found a null in field "output"; write a'),
        (b'{"input": true, "output": ""}', 'line 1: found a boolean in field "input"'),
        (b'["a", "b"]', "line 1: found a JSON array; write an object such as"),
        (b"a,b", "line 1: not JSON (Expecting value"),
        (b"[" * 100_000, "line 1: nested too deep, expected at most 64 levels"),
        (b'{"input": "\\ud800", "output": "b"}', "line 1: half a surrogate pair in a string"),
        (b'{"input": "a", "output": "b", "id": ' + b"9" * 5000 + b"}", "line 1: not JSON (Exceeds"),
        (b'{"input": "a", "output": "b", "id": NaN}', "line 1: not JSON (NaN is not JSON"),
        (b'{"input": "' + b"a" * 5_000_000, "line 1: more than 4,194,304 bytes; write one example"),
        (
            b'{"input": "a", "output": "b", "features": ["' + b"f" * 1_000_000 + b'"]}',
            "line 1: found ['fff",
        ),
        (
            b'{"input": "a", "output": "b", "features": [' + b'"f",' * 64 + b'"f"]}',
            'line 1: found a list of 65 entries in field "features"; write a list of at most 64',
        ),
        (b'{"input": "a", "output": "b", "features": "f"}', "line 1: found 'f' in field"),
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
    assert len(str(caught.value)) < 1000


ALPACA = '{{"instruction": "Add.", "input": "{}", "output": "2", "\\u001b[31mid": 1}}\n'


def test_fields_that_are_not_read_are_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(ALPACA.format("") + ALPACA.format("1+1") + '{"input": "a", "output": "b"}')
    assert [e.line for e in read_jsonl(path)] == [1, 2, 3]
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert '"instruction" (in 2), "\\\\x1b[31mid" (in 2); only input and output are' in told
    read_jsonl(path)
    assert capsys.readouterr().err == ""


def test_inputs_that_are_all_empty_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(ALPACA.format("") * 2 + ALPACA.format(r"\n"))
    with pytest.raises(InputError, match=r'"input" is empty in all 3 examples; "instruction" \(in'):
        read_jsonl(path)


def test_only_regular_files_are_read() -> None:
    with pytest.raises(InputError, match=r"/dev/zero: not a regular file"):
        read_jsonl("/dev/zero")


def test_missing_file_and_unwritable_path_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl: not readable \(No such file"):
        read_jsonl(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match=r"rows\.jsonl: cannot be written \(No such file"):
        write_jsonl(tmp_path / "missing" / "rows.jsonl", [])


def test_lone_surrogate_is_refused_before_the_file_exists(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(InputError, match="lone surrogate"):
        write_jsonl(path, [Example("\ud800", "")])
    assert not path.exists()


def test_a_file_of_examples_is_whole_or_as_it_was(tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("before")
    with pytest.raises(InputError, match=r"rows.jsonl: cannot be written \(File too large\)"):
        write_jsonl(path, [Example("x" * 20_000, "")])
    assert path.read_text() == "before"
    assert [found.name for found in tmp_path.iterdir()] == ["rows.jsonl"]
