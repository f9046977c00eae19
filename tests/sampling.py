"""What ``make test`` leaves to ``make test-thorough``: more of what it tries some of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thorough(*values: Any, name: str | None = None, left_out: bool = True) -> Any:
    """A row of a parametrized test that ``make test`` leaves out."""
    return pytest.param(*values, id=name, marks=pytest.mark.thorough if left_out else ())


def some_of(count: int, values: Iterable[Any]) -> list[Any]:
    """Rows of one value each; ``make test`` tries so many of them."""
    return [thorough(value, left_out=place >= count) for place, value in enumerate(values)]
