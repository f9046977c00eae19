"""The state of a training, and the checkpoint from which a killed one resumes exactly."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile

import torch
from rich.text import Text
from torch import Tensor, nn
from transformers import get_scheduler

from caliport.calibrate.training.processes import gathered, set_random_state
from caliport.core.places import replacing
from caliport.core.progress import console

if TYPE_CHECKING:
    from accelerate import Accelerator

_POINTS = 200


@dataclass
class State:
    """Everything in a checkpoint but the states of the random number generators.

    Attributes:
        parameters: The trained parameters, by name.
        optimizer, scheduler: Adam over them, and its learning rate schedule.
        steps: Number of steps in all.
        step: Number of steps done.
        curve: Up to 200 points of ``step`` and mean ``loss`` since the point before.
        recent: Losses since the last point.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    steps: int
    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)

    @staticmethod
    def new(
        trained: nn.Module, learning_rate: float, schedule: str, warmup: int, steps: int
    ) -> State:
        """The state before the first step; only parameters that require gradients are trained."""
        parameters = {n: p for n, p in trained.named_parameters() if p.requires_grad}
        optimizer = torch.optim.Adam(parameters.values(), lr=learning_rate)
        scheduler = get_scheduler(schedule, optimizer, warmup, steps)
        return State(parameters, optimizer, scheduler, steps)

    def advance(self, loss: float) -> None:
        """Take one optimizer step with the current gradients, and record the loss."""
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.recent.append(loss)
        if self.step % max(1, self.steps // _POINTS) == 0 or self.step == self.steps:
            self.curve.append({"step": self.step, "loss": sum(self.recent) / len(self.recent)})
            self.recent = []

    def save(self, path: Path, accelerator: Accelerator, random: dict[str, Tensor]) -> None:
        """Write to a new file and rename it, so that a kill leaves the last checkpoint.

        All processes must call this.
        """
        every = gathered(accelerator, random)
        if not accelerator.is_main_process:
            return
        state = {
            "step": self.step,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": every,
            "curve": self.curve,
            "recent": self.recent,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside, beside.open("wb") as stream:  # whose errors say why
            torch.save(state, stream)

    def load(self, path: Path, accelerator: Accelerator, title: str) -> None:
        """Restore a checkpoint, and this process's random number generators if it has them.

        A damaged one leaves all at the start.
        """
        if not _is_whole(path):
            reason = f"{title}: begins anew, its checkpoint is damaged"
            console.print(Text(reason, "yellow"), soft_wrap=True)
            return
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.curve, self.recent = state["step"], state["curve"], state["recent"]
        random = state["rng"]
        if isinstance(random, Tensor):  # a checkpoint from before several processes were supported
            random = [{"cpu": random}]
        if len(random) != accelerator.num_processes:
            console.print(
                f"{title}: going on with {accelerator.num_processes} processes from a checkpoint "
                f"of {len(random)}; their dropout differs from here on"
            )
        if accelerator.process_index < len(random):
            set_random_state(accelerator.device, random[accelerator.process_index])


def _is_whole(path: Path) -> bool:
    """Whether an archive's parts have the checksums they were written with; torch reads any."""
    try:
        with ZipFile(path) as archive:
            return archive.testzip() is None
    except (BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, struct.error):
        return False
