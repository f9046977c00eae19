"""How artifacts are timed on a device (docs/android.md)."""

from __future__ import annotations

from dataclasses import dataclass

LENGTHS = (32, 128, 512)


@dataclass(frozen=True)
class DeviceSetup:
    """What a device's turns are like, and how cool it must be before each.

    Attributes:
        lengths: Tokens of the prompts; those that do not fit some artifact's context are left out.
        cores: Cores to stay on; empty leaves that to the device.
        warmup: Answers of each length before those that are timed.
        celsius: The battery's temperature that is cool enough.
        thermal: Android's thermal status that is cool enough.
        cool_seconds: The longest to wait for that, before each turn.
        seconds: The longest that a turn may take.
    """

    lengths: tuple[int, ...] = LENGTHS
    cores: tuple[int, ...] = ()
    warmup: int = 1
    celsius: float = 35.0
    thermal: int = 0
    cool_seconds: float = 300.0
    seconds: float = 1800.0
