"""Whether two trainings gave the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_same(
    one: Mapping[str, Tensor], two: Mapping[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Relative distance of two sides of an update, all matrices together."""
    assert one.keys() == two.keys()
    flat = [torch.cat([side[name].flatten() for name in sorted(side)]) for side in (one, two)]
    assert (flat[0] - flat[1]).norm() <= tolerance * flat[0].norm()


def losses(curve: list[dict[str, float]]) -> list[float]:
    return [point["loss"] for point in curve]
