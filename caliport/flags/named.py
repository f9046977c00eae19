"""``NAME=DIR`` flags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from caliport.core.errors import InputError
from caliport.export.request import Bundle


def named(flag: str, values: Sequence[str]) -> dict[str, Path]:
    """Directories by name, from a flag's values, each ``NAME=DIR``.

    Raises:
        InputError: Another value, or a name twice.
    """
    found: dict[str, Path] = {}
    for value in values:
        name, is_pair, path = value.partition("=")
        if not is_pair or not name or not path:
            raise InputError(f"{flag}: found {value!r}, expected NAME=DIR")
        if name in found:
            raise InputError(f"{flag}: found {name} twice, expected each name once")
        found[name] = Path(path)
    return found


def bundle_of(compositions: Sequence[str] | None, shared: Sequence[str] | None) -> Bundle:
    """What ``--bundle NAME=DIR`` and ``--share NAME=DIR`` name together.

    Raises:
        InputError: See ``named``.
    """
    return Bundle(named("--bundle", compositions or ()), named("--share", shared or ()))
