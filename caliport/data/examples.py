"""Training and validation examples, and reading and writing them as JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from rich.text import Text

from caliport.core.errors import InputError, printable
from caliport.core.places import check_place, replacing
from caliport.core.progress import console
from caliport.core.untrusted import check_regular, parse_json, shown

FIELDS = ("input", "output")
_LINE_BYTES = 4 * 2**20
_FILE_BYTES = 4 * 2**30
_MOST_FEATURES, _LONGEST_FEATURE = 64, 100
_MOST_FIELDS = 100  # that are counted
_NAMED = 4  # that a message lists
_TOLD: set[str] = set()  # files whose unread fields were named


@dataclass(frozen=True)
class Example:
    """A task's input text (without any prompt) and its target text.

    ``features`` are the FLix features of this example, if it has its own; ``line`` is its line in
    the file it was read from, 0 without one.
    """

    input: str
    output: str
    features: tuple[str, ...] = ()
    line: int = field(default=0, compare=False)


def read_jsonl(path: str | Path) -> list[Example]:
    """Read examples from a JSON Lines file: one object per line with "input" and "output".

    "features" may be a list of names. Blank lines are skipped. Other fields are not read; a line
    on stderr names them.

    Raises:
        InputError: The file is missing, not a regular file, unreadable, not UTF-8 or without
            examples, no input has any text, or a line is too long or not such an object. The
            message is one line that names the file and the line.
    """
    examples: list[Example] = []
    unread: dict[str, int] = {}
    for number, line in enumerate(_lines(Path(path)), start=1):
        if line.strip():
            examples.append(_parse(line, f"{path}, line {number}", number, unread))
    if not examples:
        raise InputError(
            f"{path}, line 1: the file has no examples; "
            'write at least one line such as {"input": "...", "output": "..."}'
        )
    others = _listed(unread, len(examples))
    if not any(e.input.strip() for e in examples):
        what = f"; {others} are not read" if others else ""
        raise InputError(
            f'{path}: "input" is empty in all {len(examples):,} examples{what}; put all that the '
            'model is to read, such as an instruction and its text, together in "input"'
        )
    if others and str(path) not in _TOLD:
        _TOLD.add(str(path))
        told = f"{printable(str(path))}: not read: {others}; only input and output are"
        console.print(Text(told, "yellow"), soft_wrap=True)
    return examples


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, without a byte order mark.

    They end at the newline byte only: str.splitlines would also cut at U+2028 in a JSON string.
    """
    check_regular(path, _FILE_BYTES)
    try:
        with path.open("rb") as stream:
            for number in count(1):
                line = stream.readline(_LINE_BYTES + 1)
                if len(line) > _LINE_BYTES:
                    raise InputError(
                        f"{path}, line {number}: more than {_LINE_BYTES:,} bytes; write one "
                        "example per line"
                    )
                if not line:
                    return
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a readable file"
        ) from None


def _listed(unread: Mapping[str, int], examples: int) -> str:
    """Fields that are not read, with how many examples have them: ``"instruction" (in all)``."""
    listed = [
        f"{json.dumps(printable(name, 40), ensure_ascii=False)} "
        f"(in {'all' if count == examples else f'{count:,}'})"
        for name, count in list(unread.items())[:_NAMED]
    ]
    more = len(unread) - _NAMED
    return ", ".join(listed) + (f" and {'others' if more > 1 else 'another'}" if more > 0 else "")


def write_jsonl(path: str | Path, examples: Iterable[Example]) -> None:
    """Write examples to a UTF-8 JSON Lines file that `read_jsonl` reads back unchanged.

    The file appears whole or not at all.

    Raises:
        InputError: The file cannot be written, or a text contains a lone surrogate.
    """
    rows = [
        {"input": e.input, "output": e.output} | ({"features": e.features} if e.features else {})
        for e in examples
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        content = text.encode("utf-8")
        check_place(Path(path), "a file")
        with replacing(Path(path)) as beside:
            beside.write_bytes(content)
    except UnicodeEncodeError:
        raise InputError(f"{path}: a text has a lone surrogate; write valid Unicode text") from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); give a path in a writable directory"
        ) from None


def _parse(line: bytes, where: str, number: int, unread: dict[str, int]) -> Example:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise InputError(f"{where}: found {found}, which is not UTF-8; save it as UTF-8") from None
    row = parse_json(text, where)
    if not isinstance(row, dict):
        raise InputError(
            f"{where}: found a JSON {_kind(row)}; "
            'write an object such as {"input": "...", "output": "..."}'
        )
    for key in FIELDS:
        if key not in row:
            others = ", ".join(shown(name, 30) for name in list(row)[:_NAMED])
            raise InputError(
                f'{where}: found no field "{key}"{f", only {others}" if others else ""}; '
                f'add "{key}" with a string'
            )
        if not isinstance(row[key], str):
            raise InputError(
                f'{where}: found a {_kind(row[key])} in field "{key}"; write a string there'
            )
    features = row.get("features", [])
    if (
        not isinstance(features, list)
        or len(features) > _MOST_FEATURES
        or not all(isinstance(f, str) and 0 < len(f) <= _LONGEST_FEATURE for f in features)
    ):
        raise InputError(
            f'{where}: found {shown(features)} in field "features"; write a list of at most '
            f"{_MOST_FEATURES} names of at most {_LONGEST_FEATURE} characters there"
        )
    for name in row:
        if name not in (*FIELDS, "features") and (name in unread or len(unread) < _MOST_FIELDS):
            unread[name] = unread.get(name, 0) + 1
    return Example(row["input"], row["output"], tuple(features), number)


def _kind(value: object) -> str:
    """The JSON name of a decoded value's type."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
