"""XXX."""

from __future__ import annotations

from collections.abc import Sequence

from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.merges.common import (
    _check_same,
    _concatenated,
    _of_modules,
    _targeting,
    _weights,
)


def exact(
    updates: Sequence[LowRankUpdate], weights: Sequence[float] | None = None
) -> LowRankUpdate:
    """The weighted sum itself, by concatenation: ΔW = Σ wᵢ·Bᵢ·Aᵢ, of rank Σ rᵢ.

    A module that only some updates target keeps what those give it.

    Args:
        updates: Adapters of any ranks and modules.
        weights: One a update; default 1/N each (0.5 for two, as in the paper's "concat").

    Raises:
        InputError: A module has different shapes in two updates.
    """
    weights = _weights(updates, weights)
    _check_same(updates)
    return _of_modules(
        updates, lambda name: _concatenated(*_targeting(name, updates, weights), name)
    )
