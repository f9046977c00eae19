"""Put a benchmark's tables between markers in a document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from caliport.core.errors import InputError


def put(name: str, text: str, path: Path) -> None:
    """Replace the text between a benchmark's markers; the rest of the file is unchanged.

    Args:
        name: Name of the benchmark in the markers.
        text: The new text.
        path: The document.

    Raises:
        InputError: The file does not have the markers.
    """
    start, end = f"<!-- {name}: tables -->", f"<!-- {name}: end -->"
    before = path.read_text(encoding="utf-8")
    if start not in before or end not in before:
        raise InputError(f"{path}: no place for the tables; expected the lines {start} and {end}")
    head, _, rest = before.partition(start)
    tail = rest.partition(end)[2]
    path.write_text(f"{head}{start}\n\n{text}\n\n{end}{tail}", encoding="utf-8")


def markdown(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; all columns except the first are aligned as numbers."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (heads, *rows)]
    rule = f"|{'|'.join(['---', *['---:'] * (len(heads) - 1)])}|"
    return "\n".join([lines[0], rule, *lines[1:]])
