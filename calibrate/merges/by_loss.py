"""Merges whose weights come from a loss on a few examples: LoraHub and LM-Cocktail."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.merges.exact import exact
from caliport.calibrate.merges.linear import linear
from caliport.core.errors import InputError

# A loss that is not finite (a merge that overflows) counts as this, so that the search leaves it.
_HOPELESS = 1e30


def lorahub(
    updates: Sequence[LowRankUpdate],
    loss: Callable[[LowRankUpdate], float],
    evaluations: int = 40,
    seed: int = 0,
    l1: float = 0.05,
    bound: float = 1.5,
) -> tuple[LowRankUpdate, list[float]]:
    """LoraHub: the weights of the linear merge that minimise a loss, found without gradients.

    arXiv 2307.13269: A' = Σ wᵢAᵢ, B' = Σ wᵢBᵢ and minimise loss + l1 · Σ|wᵢ|/N over
    wᵢ ∈ [−bound, bound]; 40 evaluations, 0.05 and 1.5 are the paper's code's. That code starts at
    w = 0 with an optimiser of Nevergrad. Here: ΔW is quadratic in w, so w = 0 is a saddle and w
    and −w are the same, hence the search starts at 1/N and looks at a seeded Latin hypercube
    (a quarter of the evaluations); from the best of these COBYQA (scipy), which models the loss
    by quadratics within bounds and was made for few, costly evaluations, uses the rest. So the
    result is never worse than the linear merge by the same measure. Same seed, same result.

    Args:
        updates: Adapters of equal modules and ranks, as ``linear`` needs them: A of different
            ranks has no sum that does not depend on how it is padded.
        loss: From a merge to its loss on the examples.
        evaluations: How often ``loss`` is called at most.
        seed: Of the hypercube.
        l1: Strength of the pull to few adapters.
        bound: Largest |wᵢ|.

    Returns:
        The best merge found and its weights.

    Raises:
        InputError: Updates that ``linear`` refuses, or a setting out of range.
    """
    from scipy.optimize import minimize
    from scipy.stats import qmc

    for name, value, least in (("evaluations", evaluations, 1), ("l1", l1, 0)):
        if not least <= value < math.inf:
            raise InputError(f"LoraHub: {name} is {value}, expected {least} or more")
    if not 0 < bound < math.inf:
        raise InputError(f"LoraHub: bound is {bound}, expected more than 0")
    tried: list[tuple[float, list[float]]] = []

    def measure(point: Sequence[float]) -> float:
        if len(tried) >= evaluations:  # COBYQA's first model may take a few more than it may
            return _HOPELESS
        weights = [min(max(float(w), -bound), bound) for w in point]
        value = float(loss(linear(updates, weights)))
        value = value + l1 * sum(map(abs, weights)) / len(weights)
        tried.append((value if math.isfinite(value) else _HOPELESS, weights))
        return tried[-1][0]

    n = len(updates)
    measure([1.0 / max(n, 1)] * n)
    for point in qmc.LatinHypercube(n, rng=seed).random(evaluations // 4):
        measure((2 * point - 1) * bound)
    if evaluations > len(tried):
        minimize(
            measure,
            min(tried)[1],
            method="COBYQA",
            bounds=[(-bound, bound)] * n,
            options={
                "maxfev": evaluations - len(tried),
                "initial_tr_radius": bound / 3,
                "final_tr_radius": bound * 1e-6,
            },
        )
    weights = min(tried)[1]
    return linear(updates, weights), weights


def lm_cocktail(
    updates: Sequence[LowRankUpdate], losses: Sequence[float], temperature: float = 5.0
) -> tuple[LowRankUpdate, list[float]]:
    """LM-Cocktail: the weighted sum whose weights favour adapters of low loss.

    arXiv 2311.13534: w = softmax(−loss/temperature) over the models' losses on a few examples of
    the target task, and the models' parameters are averaged by w. The base is the same in all, so
    that is W0 + Σ wᵢ·ΔWᵢ: the exact merge. 5.0 is the paper's code's temperature.

    Args:
        updates: Adapters of any ranks and modules.
        losses: Each one's own loss on the examples.
        temperature: Low: the best adapter alone; high: the plain average.

    Returns:
        The merge and its weights, which sum to 1.

    Raises:
        InputError: Not one finite loss an adapter, a temperature not above 0, or updates that
            ``exact`` refuses.
    """
    if len(losses) != len(updates):
        raise InputError(
            f"LM-Cocktail: {len(losses)} losses for {len(updates)} adapters; expected one each"
        )
    for index, value in enumerate(losses, start=1):
        if not math.isfinite(value):
            raise InputError(
                f"LM-Cocktail: the loss of adapter {index} is {value}, expected a finite number"
            )
    if not 0 < temperature < math.inf:
        raise InputError(f"LM-Cocktail: temperature is {temperature}, expected more than 0")
    scaled = -torch.tensor(list(losses), dtype=torch.float64) / temperature
    weights = torch.softmax(scaled, dim=0).tolist()
    return exact(updates, weights), weights
