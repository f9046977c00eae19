"""DoRA as a low-rank update: in every module the nearest one to W' - W0 (Eckart-Young)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from caliport.calibrate.adapter import Adapter
from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.peft_files import read_adapter
from caliport.calibrate.peft_settings import read_config
from caliport.core.errors import InputError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Nearness:
    """How far B·A is from W' - W0: the norm of the difference over that of W' - W0.

    Attributes:
        rank: The highest rank of a module.
        mean: Mean over the modules.
        worst: The largest.
        module: The module with the largest.
    """

    rank: int
    mean: float
    worst: float
    module: str


def has_dora(directory: str | Path) -> bool:
    """Whether the settings of a LoRA directory say that it has magnitudes.

    Raises:
        InputError: See ``read_config``.
    """
    config = read_config(Path(directory))
    return config.get("use_dora") is True or config.get("fine_tune_type") == "dora"


def read_nearest(
    directory: str | Path, model: nn.Module, rank: int | None = None
) -> tuple[LowRankUpdate, Nearness | None]:
    """As ``peft_files.read_update``, but an adapter with DoRA gives the nearest low-rank update.

    Args:
        directory: A PEFT or mlx-lm LoRA directory.
        model: The base with its weights.
        rank: Rank of every module, at most that of its weight; default twice the adapter's.

    Returns:
        The update, and how near it is; None for an adapter without DoRA.

    Raises:
        InputError: See ``peft_files.read_update``, except for DoRA; or W' is not finite.
    """
    adapter = read_adapter(directory).fitted(model, directory)
    adapter = adapter.check_saved(model.get_parameter, directory)
    plain = replace(adapter, beyond={k: v for k, v in adapter.beyond.items() if k != "use_dora"})
    update = plain.low_rank(directory)
    if not adapter.magnitudes:
        return update, None
    a, b, errors = {}, {}, {}
    for name in update.modules:
        change = _change(adapter, model, name)
        if not change.isfinite().all():
            raise InputError(
                f"{directory}: {name}: DoRA divides by the norm of a row of W0 + ΔW that is 0"
            )
        u, s, vt = torch.linalg.svd(change, full_matrices=False)
        keep = min(rank or 2 * update.rank(name), len(s))
        root = s[:keep].sqrt()
        a[name], b[name] = root[:, None] * vt[:keep], u[:, :keep] * root
        errors[name] = float(s[keep:].norm() / s.norm().clamp_min(torch.finfo(s.dtype).tiny))
    nearest = LowRankUpdate(a, b)
    nearest.check_finite(directory)
    worst = max(errors, key=lambda name: errors[name])
    mean = sum(errors.values()) / len(errors)
    return nearest, Nearness(max(map(nearest.rank, a)), mean, errors[worst], worst)


def _change(adapter: Adapter, model: nn.Module, name: str) -> Tensor:
    """W' - W0 of a module, float32 [out, in]."""
    weight = model.get_parameter(f"{name}.weight").detach().float().cpu()
    if hasattr(model.get_submodule(name), "nf"):  # Conv1D (GPT-2) stores it as [in, out]
        weight = weight.T
    summed = weight + adapter.update.delta(name)
    factor = adapter.magnitudes[name] / torch.linalg.norm(summed, dim=1)
    return factor[:, None] * summed - weight
