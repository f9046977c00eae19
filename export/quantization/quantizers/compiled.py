"""Loops that numba compiles, with what it compiled kept where that is safe."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numba


def compiled(signature: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``numba.njit`` that keeps what it compiled, if there is a place that is the user's own.

    Without a home, numba would write into ``~`` in the current directory, and run what lies there.
    """

    def compile_it(function: Callable[..., Any]) -> Callable[..., Any]:
        found: Callable[..., Any]
        if os.path.isabs(os.path.expanduser("~")):
            with suppress(RuntimeError):  # numba finds no place that it can write
                found = numba.njit(signature, cache=True, nogil=True, **options)(function)
                return found
        found = numba.njit(signature, nogil=True, **options)(function)
        return found

    return compile_it
