"""What differs from runtime to runtime on a device.

``caliport.android_harness.runners.NAME``, named like the runtime, defines ``DEVICE``.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from caliport.export import runtime as runtimes

if TYPE_CHECKING:
    from caliport.android_harness.device.facts import Facts
    from caliport.android_harness.runners.kinds import JobRunner


class DeviceRuntime(Protocol):
    """One runtime on a device."""

    @property
    def python(self) -> str | None:
        """What our Python runner for Linux devices calls itself; None where there is none."""
        ...

    def default_runner(self, device: Facts, llama_main: Path | None) -> JobRunner | Path:
        """What runs artifacts where no built runner suits the device; a path is ``llama_main``.

        Raises:
            InputError: Nothing does.
        """
        ...


def get(name: str) -> DeviceRuntime:
    """What is known of a runtime on devices.

    Raises:
        InputError: There is no such runtime.
    """
    runtimes.get(name)
    found: DeviceRuntime = import_module(f"caliport.android_harness.runners.{name}").DEVICE
    return found


def runs_here_only(runner: str) -> bool:
    """Whether a runner, by its name in a result, needs this machine's Python environment."""
    known = [python for name in runtimes.names() if (python := get(name).python) is not None]
    return any(runner.startswith(python) for python in known)
