"""Readers of files from strangers: regular files, of bounded size, inside their directory.

Adapters, models and artifacts are downloaded; their files may be links, devices, huge, nested ten
thousand deep or full of control characters. Everything that reads one goes through here.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caliport.core.errors import InputError, printable

SETTINGS_BYTES = 4 * 2**20
"""Most bytes of a configuration, manifest or report."""
TOKENIZER_BYTES = 128 * 2**20
"""Most bytes of a tokenizer's file; the largest in use have some 35 MB."""
_DEPTH = 64
_NAME = re.compile(r"\w[\w-]*")
_LONGEST_NAME = 100  # bytes; a file system's 255, less what temporary names and endings add


def check_inside(path: Path, root: Path) -> None:
    """Check that a file is in a directory after all links are resolved.

    A hub cache's ``snapshots/HASH/file`` links to ``blobs`` beside ``snapshots``: allowed.

    Raises:
        InputError: The file is elsewhere.
    """
    try:
        found, home = path.resolve(), root.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: not a usable path ({error})") from None
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(found.is_relative_to(place) for place in allowed):
        raise InputError(f"{path}: is outside {root}; expected a file inside that directory")


def check_regular(path: Path, most: int | None = None, root: Path | None = None) -> int:
    """Check a file before it is read, and return its size in bytes.

    Args:
        path: The file.
        most: Most bytes that it may have; None for any size.
        root: The directory that it must be in after all links are resolved; None for anywhere.

    Raises:
        InputError: No such file, not a regular file (a device, a pipe), too large, or outside.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: not readable ({why}); expected a file") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: not a regular file; expected a file")
    if root is not None:
        check_inside(path, root)
    if most is not None and found.st_size > most:
        raise InputError(f"{path}: {found.st_size:,} bytes, expected at most {most:,}")
    return found.st_size


def read_bytes(path: Path, most: int = SETTINGS_BYTES, root: Path | None = None) -> bytes:
    """The bytes of a file that passes ``check_regular``; same arguments and errors."""
    check_regular(path, most, root)
    try:
        # Without O_NONBLOCK, a pipe put in the file's place since the check would block for ever.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            data = stream.read(most + 1)
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror}); expected a file") from None
    if len(data) > most:
        raise InputError(f"{path}: more than {most:,} bytes")
    return data


def read_text(path: Path, most: int = SETTINGS_BYTES, root: Path | None = None) -> str:
    """The UTF-8 text of a file that passes ``check_regular``; same arguments and errors."""
    try:
        return read_bytes(path, most, root).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; expected UTF-8 text") from None


def read_json(path: Path, most: int = SETTINGS_BYTES, root: Path | None = None) -> Any:
    """The JSON value of a file: see ``check_regular`` and ``parse_json``."""
    return parse_json(read_text(path, most, root), path)


def read_object(path: Path, most: int = SETTINGS_BYTES, root: Path | None = None) -> dict[str, Any]:
    """The JSON object of a file; ``InputError`` for any other value, see ``read_json``."""
    found = read_json(path, most, root)
    if not isinstance(found, dict):
        raise InputError(f"{path}: found {type(found).__name__}, expected a JSON object")
    return found


def parse_json(text: str | bytes, where: object, *, unique: bool = False) -> Any:
    """Parse JSON as RFC 8259 has it: no NaN or infinities, and at most 64 levels deep.

    Args:
        text: The document.
        where: What to name in messages: a file, or a file and line.
        unique: Whether to refuse a key that stands twice in an object; other parsers may take
            another of the two.

    Raises:
        InputError: Not JSON, too deep, a number that float64 or Python cannot hold, half a
            surrogate pair in a string, or see ``unique``.
    """
    pairs = _unique if unique else None
    try:
        value = json.loads(
            text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=pairs
        )
    except RecursionError:
        raise InputError(f"{where}: nested too deep, expected at most {_DEPTH} levels") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    _check_value(value, where)
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON; expected a finite number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is beyond float64; expected a finite number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} stands twice in an object")
    return found


def _check_value(root: Any, where: object) -> None:
    level = [root]
    for _ in range(_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value)
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
            elif isinstance(value, str) and not _is_text(value):
                raise InputError(f"{where}: half a surrogate pair in a string; expected text")
        if not below:
            return
        level = below
    raise InputError(f"{where}: nested too deep, expected at most {_DEPTH} levels")


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def number(
    value: object, where: str, low: float, high: float, *, whole: bool = False
) -> int | float:
    """A number from a stranger's file, checked.

    Args:
        value: What the file has; a boolean is not a number.
        where: The file and field, for the message.
        low: Least value allowed.
        high: Greatest value allowed.
        whole: Whether only integers are allowed.

    Raises:
        InputError: Another type, a fraction where an integer is due, NaN, or out of range.
    """
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        what = "an integer" if whole else "a number"
        raise InputError(
            f"{where} is {shown(value)}, expected {what} from {_bound(low)} to {_bound(high)}"
        )
    return value


def _bound(value: float) -> str:
    return str(value) if isinstance(value, int) and abs(value) < 10**9 else f"{value:g}"


def check_name(name: str, what: str) -> None:
    """Check a name that becomes part of a file's or a module's name.

    Args:
        name: Such as a task's.
        what: What it names, for the message.

    Raises:
        InputError: Other characters than letters, digits, ``-`` and ``_``, or too long.
    """
    if _NAME.fullmatch(name) is None or len(name.encode()) > _LONGEST_NAME:
        raise InputError(
            f"{what} {shown(name)}: expected a name of letters, digits, - and _, of at most "
            f"{_LONGEST_NAME} bytes"
        )


def mapping(value: object, where: str) -> Mapping[str, Any]:
    """A JSON object from a stranger's file; ``InputError`` for anything else."""
    if not isinstance(value, dict):
        raise InputError(f"{where} is {shown(value)}, expected an object")
    return value


def shown(value: object, most: int = 60) -> str:
    """A value from a stranger's file for a message: its ``repr``, printable and cut."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return "an integer of more than 18 digits"
    if isinstance(value, str):
        value = value[: most + 1]
    elif isinstance(value, dict | list | tuple | set) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value):,} entries"
    return printable(repr(value), most)
