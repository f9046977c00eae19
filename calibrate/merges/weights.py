"""Weights of any merge, chosen from a small grid by a loss on held-out examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from caliport.core.errors import InputError

GRID = (0.5, 1.0)
"""The weights that are tried for every adapter."""
MOST = 6
"""Most adapters that are searched: 65 merges."""


@dataclass(frozen=True)
class Tried:
    """Weights that were tried, and the loss of their merge; None where it is not finite."""

    weights: tuple[float, ...]
    loss: float | None


def search_weights(
    adapters: int, loss: Callable[[tuple[float, ...]], float]
) -> tuple[tuple[float, ...], list[Tried]]:
    """The best of all combinations of ``GRID``, and of 1/N each, the default.

    Two adapters are four merges. The first of equally good ones is kept, and 1/N comes first.

    Args:
        adapters: N.
        loss: From weights to the loss of their merge.

    Returns:
        The weights, and all that were tried.

    Raises:
        InputError: More than ``MOST`` adapters, or no merge has a finite loss.
    """
    if adapters > MOST:
        raise InputError(
            f"a search of weights tries {len(GRID)}^N merges; found {adapters} adapters, expected "
            f"at most {MOST}; give a weight for each"
        )
    equal = (1 / adapters,) * adapters
    grid = dict.fromkeys([equal, *product(GRID, repeat=adapters)])
    losses = {weights: loss(weights) for weights in grid}
    finite = {weights: value for weights, value in losses.items() if math.isfinite(value)}
    if not finite:
        raise InputError("a search of weights: no merge has a finite loss; give a weight for each")
    tried = [Tried(weights, finite.get(weights)) for weights in losses]
    return min(finite, key=lambda weights: finite[weights]), tried
