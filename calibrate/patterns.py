"""PEFT's patterns of module names (``rank_pattern``, ``alpha_pattern``), matched in bounded time.

PEFT takes a key as a regular expression: ``re.match(rf"(.*\\.)?({key})$", name)``. Almost all keys
are names, which are compared without one. Of regular expressions, those that can stand for names
are tried, with a limit in time: a stranger's may backtrack for ever.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from caliport.core.errors import InputError
from caliport.core.untrusted import shown

SECONDS = 2.0
"""Longest time for the regular expressions of one setting."""
_LONGEST = 512
_PAIRS = 20_000_000
_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
# What Python's re and the regex package, which has time limits, understand in the same way.
# Counts are left out: a{999} in itself a few times takes all memory to compile.
_SIMPLE = re.compile(
    r"(?:[A-Za-z0-9_.\-^$|*+?()]|\\[.dw]|\[\^?(?:[A-Za-z0-9_.\-]|\\[.dw])+\])+", re.ASCII
)


def match_patterns(
    patterns: Mapping[str, float], names: Sequence[str], where: str
) -> dict[str, float]:
    """The value of the first pattern that matches each name; names without one are left out.

    Args:
        patterns: Values by pattern.
        names: Module names.
        where: The file and field, for messages.

    Raises:
        InputError: A pattern that is invalid, too long, too slow or not of a kind that stands for
            module names; too many patterns.
    """
    if len(patterns) * len(names) > _PAIRS:
        raise InputError(
            f"{where} has {len(patterns):,} patterns for {len(names):,} modules; expected at most "
            f"{_PAIRS:,} pairs"
        )
    compiled = [(key, _compiled(key, where), value) for key, value in patterns.items()]
    deadline = time.monotonic() + SECONDS
    found: dict[str, float] = {}
    for name in names:
        for key, pattern, value in compiled:
            try:
                fits = _is_end(key, name) if pattern is None else _fits(pattern, name, deadline)
            except TimeoutError:
                raise InputError(
                    f"{where}: {shown(key)} takes more than {SECONDS:g} s to match; expected "
                    "a module name"
                ) from None
            if fits:
                found[name] = value
                break
    return found


def _compiled(key: str, where: str) -> Any:
    """The regular expression of a key; None for a plain name."""
    if len(key) > _LONGEST:
        raise InputError(
            f"{where}: a pattern of {len(key):,} characters, expected at most {_LONGEST}"
        )
    if _NAME.fullmatch(key):
        return None
    import regex

    if not _SIMPLE.fullmatch(key) or "(?" in key.replace("(?:", ""):
        raise InputError(
            rf"{where}: {shown(key)} is not a pattern that is tried here; expected a module name, "
            r"or a regular expression of names with \., \d, \w, […], (a|b), *, + and ?"
        )
    try:
        re.compile(key)
        return regex.compile(rf"(.*\.)?({key})$")
    except (re.error, regex.error, RecursionError) as error:
        raise InputError(
            f"{where}: {shown(key)} is not a regular expression ({error}); expected a module name"
        ) from None


def _fits(pattern: Any, name: str, deadline: float) -> bool:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return pattern.match(name, timeout=left) is not None


def _is_end(key: str, name: str) -> bool:
    """Whether a plain key matches: the name or an end of it after a dot; its dots are any sign."""
    start = len(name) - len(key)
    if start < 0 or name[-1:] != key[-1:] != ".":
        return False
    if start and name[start - 1] != ".":
        return False
    return all(k in (".", n) for k, n in zip(key, name[start:], strict=True))
