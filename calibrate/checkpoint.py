"""What a training writes now and then, so that one killed at any moment goes on exactly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from caliport_core.progress import console


def save(
    path: Path,
    accelerator: Accelerator,
    state: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Write a checkpoint beside and rename, so that a kill leaves the one before.

    Args:
        path: The file; the main process writes it.
        accelerator: Of the training.
        state: ``parameters`` by name, and plain values.
        optimizer, scheduler: Of the training.
    """
    random = gather_object([_random_state()])
    if not accelerator.is_main_process:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        **state,
        "parameters": {name: p.detach().cpu() for name, p in state["parameters"].items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random": random,
    }
    beside = path.with_suffix(".new")
    torch.save(content, beside)
    os.replace(beside, path)


def restore(
    path: Path,
    accelerator: Accelerator,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> dict[str, Any]:
    """Take up a checkpoint; gives the plain values that were saved with it."""
    state = torch.load(path, weights_only=True, map_location="cpu")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    random = state["random"]
    if len(random) == accelerator.num_processes:
        _set_random_state(random[accelerator.process_index])
    elif accelerator.is_main_process:
        console.print(
            f"{path.name}: saved by {len(random)} processes, continued by "
            f"{accelerator.num_processes}; dropout differs from an uninterrupted run"
        )
    taken = ("parameters", "optimizer", "scheduler", "random")
    return {name: value for name, value in state.items() if name not in taken}


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
