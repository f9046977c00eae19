"""A row's record: a file of parts, each with the settings it was measured with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from caliport.core.places import replacing


def part(
    record: Path, name: str, key: Mapping[str, Any], make: Callable[[], dict[str, Any]]
) -> bool:
    """Measure a part and add it to the record, unless it is there with the same key.

    Returns:
        Whether it was measured now.
    """
    known = read(record)
    if known.get(name, {}).get("key") == json.loads(json.dumps(key)):
        return False
    found = make()
    write(record, {**read(record), name: {"key": dict(key), **found}})
    return True


def read(record: Path) -> dict[str, Any]:
    """A record's parts; none where there is no record."""
    if not record.is_file():
        return {}
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


def write(record: Path, found: Mapping[str, Any]) -> None:
    """Write a record; it appears whole or not at all."""
    with replacing(record) as beside:
        beside.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
