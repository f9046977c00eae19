"""LM-Cocktail: weights from each adapter's own loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.merges.common import WeightSearch
from caliport.calibrate.merges.exact import exact
from caliport.core.errors import InputError


def lm_cocktail(
    updates: Sequence[LowRankUpdate],
    loss: Callable[[LowRankUpdate], float],
    temperature: float = 5.0,
) -> tuple[LowRankUpdate, list[float]]:
    """LM-Cocktail: the weighted sum with larger weights for adapters of lower loss.

    arXiv 2311.13534: w = softmax(−loss/temperature) over the models' losses on a few examples of
    the target task; the models' parameters are averaged with w. All share one base, so that is
    W0 + Σ wᵢ·ΔWᵢ: the exact merge. The default 5.0 is the temperature of the paper's code.

    Args:
        updates: Adapters of any ranks and modules.
        loss: From an update to its loss on the examples; called once for each adapter.
        temperature: Low: nearly the best adapter alone; high: nearly the plain average.

    Returns:
        The merge and its weights, which sum to 1.

    Raises:
        InputError: A loss that is not finite, a temperature not above 0, or updates that ``exact``
            refuses.
    """
    if not 0 < temperature < math.inf:
        raise InputError(f"LM-Cocktail: temperature is {temperature}, expected more than 0")
    losses = [loss(update) for update in updates]
    for index, value in enumerate(losses, start=1):
        if not math.isfinite(value):
            raise InputError(
                f"LM-Cocktail: the loss of adapter {index} is {value}, expected a finite number"
            )
    scaled = -torch.tensor(losses, dtype=torch.float64) / temperature
    weights = torch.softmax(scaled, dim=0).tolist()
    return exact(updates, weights), weights


WEIGHT_SEARCH = WeightSearch(
    name="lm-cocktail",
    label="LM-Cocktail",
    source="arXiv 2311.13534",
    limits="",
    function=lm_cocktail,
)
