"""ONNX Runtime on a device: our runner, which ``caliport runner build`` makes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from caliport.android_harness.runners.by_runtime import DeviceRuntime
from caliport.android_harness.runners.kinds import JobRunner
from caliport.core.errors import InputError

if TYPE_CHECKING:
    from caliport.android_harness.device.facts import Facts

NAME = "onnx"


class OnnxOnDevice:
    """See ``caliport.android_harness.runners.by_runtime.DeviceRuntime``."""

    python = None

    def default_runner(self, device: Facts, llama_main: Path | None) -> JobRunner | Path:
        """None: it must be built."""
        raise InputError(
            f"device {device.serial}: no ONNX runner for {device.abi}; expected --runner DIR, made "
            "by caliport runner build"
        )


DEVICE: DeviceRuntime = OnnxOnDevice()
