"""The parameters of merges and corrections, read off their functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def parameters_of(function: Callable[..., Any], inputs: int) -> dict[str, Any]:
    """Names and defaults of a function's arguments after its first ``inputs``."""
    arguments = list(inspect.signature(function).parameters.values())[inputs:]
    return {argument.name: argument.default for argument in arguments}
