"""Read published tables of texts (CSV, TSV, JSON, JSON Lines), with limits on their size."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caliport.core.errors import InputError

# Larger than the largest published file (TED's training table, 0.8 GB), but still a safe limit.
LARGEST_FILE = 4 << 30
LARGEST_LINE = 1 << 20
# Smaller for a JSON list, which is decoded at once.
LARGEST_JSON = 64 << 20


@dataclass(frozen=True)
class Row:
    """One record of a table: its fields by name, and its position, for messages."""

    fields: Mapping[str, Any]
    where: str

    def text(self, name: str) -> str:
        """A field's text, stripped.

        Raises:
            InputError: The field is missing, not a string or blank.
        """
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            found = "no field" if name not in self.fields else "no text in field"
            known = ", ".join(str(field) for field in self.fields) or "none"
            raise InputError(f'{self.where}: found {found} "{name}"; the fields are: {known}')
        return value.strip()


def find(root: Path, stems: Sequence[str], suffixes: Sequence[str]) -> Path:
    """The first of the files that exists.

    Raises:
        InputError: None of them exists.
    """
    names = [stem + suffix for stem in stems for suffix in suffixes]
    for name in names:
        if (root / name).is_file():
            return root / name
    raise InputError(f"{root}: found none of the files {', '.join(names)}; fetch the complete set")


def read_rows(path: Path) -> Iterator[Row]:
    """The records of a file, by its suffix: .csv, .tsv, .jsonl, or .json for a list of objects.

    Raises:
        InputError: The file is unreadable, too large, not UTF-8, or not in that format.
    """
    if path.suffix == ".json":
        yield from _json_rows(path)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(read_lines(path), start=1):
            if line.strip():
                yield _object(_decode(line, f"{path}, line {number}"), f"{path}, line {number}")
    else:
        yield from _csv_rows(path, "\t" if path.suffix == ".tsv" else ",")


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their newlines, read one at a time.

    Only the newline byte ends a line: `str.splitlines` would also split at other separators.

    Raises:
        InputError: The file is unreadable, not UTF-8 or over `LARGEST_FILE` bytes, or a line is
            over `LARGEST_LINE` bytes.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise InputError(f"{path}: found {size} bytes, at most {LARGEST_FILE} are read")
        with path.open("rb") as stream:
            number = 0
            while line := stream.readline(LARGEST_LINE + 1):
                number += 1
                if len(line) > LARGEST_LINE:
                    raise InputError(
                        f"{path}, line {number}: found more than {LARGEST_LINE} bytes; "
                        "expected lines of text"
                    )
                yield line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").decode("utf-8")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a readable file"
        ) from None
    except UnicodeDecodeError:
        raise InputError(
            f"{path}, line {number}: found text that is not UTF-8; fetch it again"
        ) from None


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(read_lines(path), delimiter=delimiter, strict=delimiter == ",")
    head: list[str] = []
    start = 1
    for cells in _checked(reader, path):
        where = f"{path}, line {start}"
        start = reader.line_num + 1
        if not head:
            head = [name.strip() for name in cells]
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(head):
            raise InputError(f"{where}: found {len(cells)} columns, the first line has {len(head)}")
        # A quote that is never closed would include the lines below.
        if delimiter == "\t" and any("\n" in cell for cell in cells):
            raise InputError(f'{where}: found a line break in a field; close or double its "')
        yield Row(dict(zip(head, cells, strict=True)), where)


def _checked(reader: Iterable[list[str]], path: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        line = getattr(reader, "line_num", 0)
        raise InputError(f"{path}, line {line}: found no valid CSV ({error})") from None


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise InputError(f"{path}: found {size} bytes; use JSON Lines above {LARGEST_JSON}")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a readable file"
        ) from None
    content = _decode("".join(read_lines(path)), str(path))
    if not isinstance(content, list):
        raise InputError(f"{path}: found no JSON list; expected a list of objects")
    for number, value in enumerate(content, start=1):
        yield _object(value, f"{path}, entry {number}")


def _decode(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deeply nested"
        raise InputError(f"{where}: found text that is not JSON ({reason})") from None


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{where}: found no JSON object; expected one with the set's fields")
    return Row(value, where)
