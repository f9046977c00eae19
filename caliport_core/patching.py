"""What touches the whole process: attributes swapped for a while, and third-party warnings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While the body runs, an attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Python warnings and log records below ERROR while the body runs.

    torchao 0.18 logs every optional library it cannot load, torch 2.13 and executorch 1.5 log each
    deprecation they meet in one another. None of it is anything a user can act on.
    """
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
