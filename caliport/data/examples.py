"""Training and validation examples, and reading and writing them as JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from caliport.core.errors import InputError

FIELDS = ("input", "output")


@dataclass(frozen=True)
class Example:
    """A task's input text (without any prompt) and its target text.

    ``features`` are the FLix features of this example, if it has its own.
    """

    input: str
    output: str
    features: tuple[str, ...] = ()


def read_jsonl(path: str | Path) -> list[Example]:
    """Read examples from a JSON Lines file: one object per line with "input" and "output".

    "features" may be a list of names. Blank lines are skipped and other fields are ignored.

    Raises:
        InputError: The file is missing, unreadable, not UTF-8 or without examples, or a line is
            not such an object. The message is one line that names the file and the line.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a readable file"
        ) from None
    # Split on the newline byte only: str.splitlines would also cut at U+2028 inside a JSON string.
    examples = [
        _parse(line, f"{path}, line {number}")
        for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
        if line.strip()
    ]
    if not examples:
        raise InputError(
            f"{path}, line 1: the file has no examples; "
            'write at least one line such as {"input": "...", "output": "..."}'
        )
    return examples


def write_jsonl(path: str | Path, examples: Iterable[Example]) -> None:
    """Write examples to a UTF-8 JSON Lines file that `read_jsonl` reads back unchanged.

    Raises:
        InputError: The file cannot be written, or a text contains a lone surrogate.
    """
    rows = [
        {"input": e.input, "output": e.output} | ({"features": e.features} if e.features else {})
        for e in examples
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        Path(path).write_bytes(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise InputError(f"{path}: a text has a lone surrogate; write valid Unicode text") from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); give a path in a writable directory"
        ) from None


def _parse(line: bytes, where: str) -> Example:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise InputError(f"{where}: found {found}, which is not UTF-8; save it as UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deeply nested"
        raise InputError(
            f"{where}: found text that is not JSON ({reason}); write one JSON object per line"
        ) from None
    if not isinstance(row, dict):
        raise InputError(
            f"{where}: found a JSON {_kind(row)}; "
            'write an object such as {"input": "...", "output": "..."}'
        )
    for field in FIELDS:
        if field not in row:
            raise InputError(f'{where}: found no field "{field}"; add "{field}" with a string')
        if not isinstance(row[field], str):
            raise InputError(
                f'{where}: found a {_kind(row[field])} in field "{field}"; write a string there'
            )
    features = row.get("features", [])
    if not isinstance(features, list) or not all(isinstance(f, str) and f for f in features):
        raise InputError(
            f'{where}: found {features!r} in field "features"; write a list of names there'
        )
    return Example(row["input"], row["output"], tuple(features))


def _kind(value: object) -> str:
    """The JSON name of a decoded value's type."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
