"""What training uses of accelerate: device, precision, and sums over processes.

There is no DistributedDataParallel wrapper: what is trained is attached to the model by hooks and
its own forward is never called. So gradients are summed here, in one flat buffer per step.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from caliport.core.errors import InputError
from caliport.core.processes import SIGNALS, note_signal, process_count

if TYPE_CHECKING:
    from accelerate import Accelerator

_PRECISION = "ACCELERATE_MIXED_PRECISION"
_SIGNALS = (signal.SIGINT, *SIGNALS)


@contextmanager
def accelerated() -> Iterator[Accelerator]:
    """An ``Accelerator`` as configured by its launcher; by default bf16 on a GPU that supports it.

    accelerate keeps its state in classes. It is cleared afterwards unless it existed before, so
    that a later call can read another environment. A process group stays open.

    Raises:
        InputError: The launcher asks for a mixed precision other than bf16.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    asked = os.environ.get(_PRECISION)
    if asked not in (None, "no", "bf16"):
        raise InputError(f"{_PRECISION}: found {asked!r}; expected no or bf16")
    fresh = [s for s in (AcceleratorState, GradientState, PartialState) if not s._shared_state]
    # Without a GPU, accelerate treats launched processes as single ones unless given cpu=True.
    alone = process_count() > 1 and not torch.accelerator.is_available()
    try:
        if AcceleratorState in fresh:
            yield Accelerator(cpu=alone, mixed_precision=asked or _best_precision())
        else:
            yield Accelerator()
    finally:
        for state in fresh:
            state._reset_state()


def _best_precision() -> str:
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"


@contextmanager
def on_device(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Move modules to a device, and back to their own devices afterwards."""
    homes = [next(module.parameters()).device for module in modules]
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)


def same_start(accelerator: Accelerator, parameters: Sequence[nn.Parameter], step: int) -> None:
    """Copy the main process's parameter values to all processes.

    Raises:
        InputError: The processes are at different steps, because they read different checkpoints.
    """
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import broadcast, gather_object

    steps = gather_object([step])
    if len(set(steps)) > 1:
        raise InputError(
            f"the processes found checkpoints of different steps ({', '.join(map(str, steps))}); "
            "the run directory must be one that all of them share"
        )
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(broadcast(parameter.detach().contiguous()))


def summed(
    accelerator: Accelerator, parameters: Sequence[nn.Parameter], values: Tensor
) -> list[float]:
    """Sum gradients, in place, and a few values [n] over the processes, in one reduction.

    A parameter without a gradient in any process stays without one, as in a single process: the
    optimizer skips it, whereas a zero gradient would still apply its momentum.
    """
    if accelerator.num_processes == 1:
        return [float(value) for value in values.tolist()]
    has = values.new_tensor([float(p.grad is not None) for p in parameters])
    flat = torch.cat([values, has, *(_flat_gradient(p) for p in parameters)])
    for parameter in parameters:
        parameter.grad = None
    flat = accelerator.reduce(flat, "sum")
    sizes = [len(values), len(has), *(p.numel() for p in parameters)]
    values, has, *gradients = flat.split(sizes)
    for parameter, count, gradient in zip(parameters, has.tolist(), gradients, strict=True):
        if count:
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
    return [float(value) for value in values.tolist()]


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), device=parameter.device)
    return parameter.grad.flatten().float()


def random_state(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that dropout draws from, by device type."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_state(device: torch.device, states: dict[str, Tensor]) -> None:
    """Restore the states from ``random_state``; a missing device type is left unchanged."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])


def gathered(accelerator: Accelerator, one: Any) -> list[Any]:
    """The objects of all processes, in order of rank."""
    if accelerator.num_processes == 1:
        return [one]
    from accelerate.utils import gather_object

    return list(gather_object([one]))


class Stop:
    """Whether a signal has asked to stop."""

    asked = False


@contextmanager
def stoppable(active: bool) -> Iterator[Stop]:
    """Turn SIGINT, SIGTERM and SIGHUP into ``asked`` inside the block, which can save and stop.

    In a single process a second signal interrupts at once. Launched processes ignore a second one:
    they get each signal twice, from the terminal and from the launcher, which stops them itself.

    Raises:
        KeyboardInterrupt: The block finished although a signal had asked it to stop.
    """
    stop = Stop()
    if not active or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: object) -> None:
        note_signal(number)
        if stop.asked and process_count() == 1:
            raise KeyboardInterrupt
        stop.asked = True

    kept = {s: signal.getsignal(s) for s in _SIGNALS}
    mine = [s for s, handler in kept.items() if handler not in (None, signal.SIG_IGN)]
    try:
        for number in mine:
            signal.signal(number, ask)
        yield stop
    finally:
        for number in mine:
            signal.signal(number, kept[number])
    if stop.asked:
        raise KeyboardInterrupt
