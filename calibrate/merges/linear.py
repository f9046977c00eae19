"""Linear merge: the average of the As and of the Bs."""

from __future__ import annotations

from collections.abc import Sequence

from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.merges.common import Merge, check_shapes, resolve_weights, summed
from caliport.core.errors import InputError

_ANY = (
    "exact takes any: --method exact, or merge: exact in a recipe, also under a correction, and "
    "exact for linear in calibration.methods"
)


def linear(
    updates: Sequence[LowRankUpdate], weights: Sequence[float] | None = None
) -> LowRankUpdate:
    """Average A and B separately: A' = Σ wᵢAᵢ, B' = Σ wᵢBᵢ, ΔW' = B'·A'.

    Eq. 5 of Learnable Calibration (arXiv 2507.16083), where wᵢ = 1/N. This is not the weighted
    sum of the ΔWᵢ: it has cross terms Bᵢ·Aⱼ. The adapters' scaling is inside B, so adapters with
    the same α/r give exactly the paper's merge.

    Args:
        updates: Adapters of equal rank in every module.
        weights: One per update; default 1/N each.

    Raises:
        InputError: The updates target different modules or have different ranks or shapes.
    """
    weights = resolve_weights(updates, weights)
    _check_equal(updates)
    check_shapes(updates)
    pairs = list(zip(weights, updates, strict=True))
    names = updates[0].modules
    return LowRankUpdate(
        {n: summed([w * u.a[n] for w, u in pairs]) for n in names},
        {n: summed([w * u.b[n] for w, u in pairs]) for n in names},
    )


MERGE = Merge(
    name="linear",
    label="linear merge (Eq. 5)",
    source="Learnable Calibration, arXiv 2507.16083, Eq. 5",
    limits="adapters of equal target modules and ranks",
    difference="averaging A and B separately adds cross terms Bᵢ·Aⱼ of different adapters",
    function=linear,
)


def _check_equal(updates: Sequence[LowRankUpdate]) -> None:
    """Check for equal modules and ranks, which averaging A and B separately needs."""
    first = updates[0]
    for index, other in enumerate(updates[1:], start=2):
        if other.modules != first.modules:
            odd = sorted(set(first.modules) ^ set(other.modules))[0]
            raise InputError(
                f"linear merge: {odd} is in only one of adapters 1 and {index}; "
                f"expected the same target modules ({_ANY})"
            )
        for name in first.modules:
            if first.rank(name) != other.rank(name):
                raise InputError(
                    f"linear merge: {name} has rank {first.rank(name)} in adapter 1 and "
                    f"{other.rank(name)} in adapter {index}; expected equal ranks "
                    f"({_ANY})"
                )
