"""A device's properties, choosing one, and whether an artifact fits."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from caliport.android_harness.device.adb import NO_DEVICE, Device, listed
from caliport.core.errors import InputError
from caliport.core.untrusted import shown
from caliport.export.artifact import Artifact
from caliport.validation.records.record import Name, Record, Some

ROOT = "/data/local/tmp"
"""The one directory of a device where adb may write and run programs without root."""
ABIS = {"arm64-v8a": 183, "x86_64": 62}
"""ABIs that runners are built for, and their machine number in an ELF header."""
_MACHINES = {"aarch64": "arm64-v8a", "x86_64": "x86_64"}
_FEATURES = {"asimddp": "dotprod", "i8mm": "i8mm"}  # /proc/cpuinfo's name, and the field's
_MARK = "caliport-fact"
_CORES = re.compile(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*")
_DIGITS = 15  # of a number; more is no amount of memory or space
# One round trip. What a device does not have leaves its part empty.
_ASK = f"""
for name in ro.product.cpu.abi ro.build.version.release ro.product.manufacturer \
    ro.product.model ro.kernel.qemu ro.boot.qemu; do
  echo {_MARK} $name; getprop $name
done
echo {_MARK} machine; uname -m
echo {_MARK} cores; cat /sys/devices/system/cpu/present
echo {_MARK} cpuinfo; cat /proc/cpuinfo
echo {_MARK} meminfo; cat /proc/meminfo
echo {_MARK} space; df -k {ROOT}
echo {_MARK} battery; dumpsys battery
echo {_MARK} thermal; dumpsys thermalservice
echo {_MARK} board; cat /proc/device-tree/compatible
"""


class Facts(Record):
    """What a device is.

    Attributes:
        serial: What adb names it.
        kind: ``phone``; ``emulator`` for a virtual machine, whose times say nothing; ``linux``
            for anything that is not Android.
        model: Of the maker.
        android: Version, such as ``15``; empty where it is not Android.
        abi: The first that it runs, such as ``arm64-v8a``.
        cores: Of the processor, sleeping ones included.
        features: Of the processor, among ``dotprod`` and ``i8mm``.
        memory: Bytes of it.
        free_memory: Bytes that a program could have now.
        free_space: Bytes for files in ``ROOT``.
        battery: Level from 0 to 1; None where it has none.
        celsius: The battery's temperature.
        thermal: Android's thermal status, 0 (none) to 6 (shutdown).
    """

    serial: Name
    kind: Literal["phone", "emulator", "linux"]
    model: Name
    android: Name
    abi: Name
    cores: Some
    features: tuple[Name, ...]
    memory: int
    free_memory: int
    free_space: int
    battery: float | None
    celsius: float | None
    thermal: int | None


def facts(device: Device) -> Facts:
    """Ask a device what it is.

    Raises:
        InputError: It went away, or does not say how many cores, how much memory or space it has.
    """
    parts = _parts(device.script(_ASK).out)
    emulated = "1" in (parts["ro.kernel.qemu"], parts["ro.boot.qemu"])
    android = parts["ro.build.version.release"]
    words = re.findall(r"^Features\s*:(.*)$", parts["cpuinfo"], re.MULTILINE)
    names = set(" ".join(words).split())
    level = _number(r"level: (\d+)", parts["battery"])
    temperature = _number(r"temperature: (-?\d+)", parts["battery"])
    thermal = _number(r"Thermal Status: (\d+)", parts["thermal"])
    machine = parts["machine"]
    maker = f"{parts['ro.product.manufacturer']} {parts['ro.product.model']}".strip()
    virtual = emulated or "linux,dummy-virt" in parts["board"]  # QEMU's board
    return Facts(
        serial=device.serial,
        kind="emulator" if virtual else "phone" if android else "linux",
        model=maker or machine,
        android=android,
        abi=parts["ro.product.cpu.abi"] or _MACHINES.get(machine, machine),
        cores=_cores(parts["cores"], device),
        features=tuple(name for key, name in _FEATURES.items() if key in names),
        memory=1024 * _needed(r"MemTotal:\s*(\d+)", parts["meminfo"], device, "/proc/meminfo"),
        free_memory=1024
        * _needed(r"MemAvailable:\s*(\d+)", parts["meminfo"], device, "/proc/meminfo"),
        free_space=parse_space(parts["space"], device),
        battery=None if level is None else level / 100,
        celsius=None if temperature is None else temperature / 10,
        thermal=thermal,
    )


def parse_space(text: str, device: Device) -> int:
    """Free bytes, of what ``df -k`` says of ``ROOT``.

    Raises:
        InputError: It says something else.
    """
    return 1024 * _needed(r"(\d+)\s+\d+%\s+\S+\s*$", text, device, f"df -k {ROOT}")


def _parts(text: str) -> Mapping[str, str]:
    """What a device said to each question; nothing where an answer is not there."""
    pieces = (piece.partition("\n") for piece in text.split(f"{_MARK} ")[1:])
    return defaultdict(str, {name.strip(): body.strip() for name, _, body in pieces})


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return None if found is None or len(found[1]) > _DIGITS else int(found[1])


def _needed(pattern: str, text: str, device: Device, source: str) -> int:
    found = _number(pattern, text)
    if found is None:
        said = " ".join(text.split())[:80]
        raise InputError(f"device {device.serial}: {source}: found {said!r}, expected a number")
    return found


def _cores(text: str, device: Device) -> int:
    """Of a list such as ``0-3,6``."""
    spans = re.findall(r"(\d{1,4})(?:-(\d{1,4}))?", text) if _CORES.fullmatch(text) else []
    sizes = [int(last or first) - int(first) + 1 for first, last in spans]
    if not sizes or min(sizes) < 1:
        raise InputError(
            f"device {device.serial}: found cores {shown(text)}, expected a list such as 0-3,6"
        )
    return sum(sizes)


def all_facts() -> tuple[list[Facts], list[str]]:
    """Of each device that can be used; and of each other one, why it cannot."""
    found: list[Facts] = []
    troubles = []
    devices = listed()
    with ThreadPoolExecutor(max(1, len(devices))) as pool:
        asked = [
            (line, pool.submit(facts, Device(line.serial)) if line.trouble() is None else None)
            for line in devices
        ]
        for line, answer in asked:
            try:
                if answer is None:
                    troubles.append(str(line.trouble()))
                else:
                    found.append(answer.result())
            except InputError as error:
                troubles.append(str(error))
    return found, troubles


def choose(wanted: str | None = None) -> Device:
    """The device to use.

    Args:
        wanted: Its serial; or what it must be, comma-separated: an ABI, ``phone``, ``emulator``,
            ``dotprod``, ``i8mm``, ``android>=13``, ``memory>=6`` (GB, free). The first that fits
            is taken. None takes ``ANDROID_SERIAL``, or the only one there is.

    Raises:
        InputError: None fits, or several and none was chosen.
    """
    devices = listed()
    wanted = wanted or os.environ.get("ANDROID_SERIAL")
    if not devices:
        raise InputError(NO_DEVICE)
    seen = ", ".join(line.serial for line in devices)
    if wanted is None:
        if len(devices) > 1:
            raise InputError(f"adb sees {len(devices)} devices ({seen}); choose one by its serial")
        line = devices[0]
    else:
        named = [line for line in devices if line.serial == wanted]
        if not named:
            return _first_fitting(wanted, seen)
        line = named[0]
    trouble = line.trouble()
    if trouble is not None:
        raise InputError(trouble)
    return Device(line.serial)


def _first_fitting(wanted: str, seen: str) -> Device:
    words = [word.strip() for word in wanted.split(",")]
    tests = [_requirement(word) for word in words]
    if None in tests:
        raise InputError(f"device {wanted}: not connected; adb sees {seen}")
    found, _ = all_facts()
    for facts in found:
        if all(test(facts) for test in tests if test is not None):
            return Device(facts.serial)
    raise InputError(f"device {wanted}: none of {seen} is usable and like that")


def _requirement(word: str) -> Callable[[Facts], bool] | None:
    """The test that a word stands for; None for anything else."""
    if word in _FEATURES.values():
        return lambda facts: word in facts.features
    if word in ABIS:
        return lambda facts: facts.abi == word
    if word in ("phone", "emulator", "linux"):
        return lambda facts: facts.kind == word
    limit = re.fullmatch(r"(android|memory)>=(\d+)", word)
    if limit is None:
        return None
    least = int(limit[2])
    if limit[1] == "memory":
        return lambda facts: facts.free_memory >= least * 1e9
    return lambda facts: (_number(r"^(\d+)", facts.android) or 0) >= least


def obstacles(found: Facts, artifact: Artifact) -> list[str]:
    """Why an artifact would not run on a device; empty if no reason is known.

    Its weights must fit into the memory that is free now, and its files into the free space. That
    may still not be enough.
    """
    reasons = []
    if found.abi not in ABIS:
        reasons.append(f"ABI {found.abi}: runners are built for {' and '.join(ABIS)}")
    size = sum(path.stat().st_size for path in artifact_files(artifact).values())
    for room, name in ((found.free_memory, "memory"), (found.free_space, f"space in {ROOT}")):
        if size > room:
            reasons.append(f"{size / 1e6:.0f} MB do not fit {room / 1e6:.0f} MB of free {name}")
    return reasons


def artifact_files(artifact: Artifact) -> dict[str, Path]:
    """The files of an artifact that a device needs, by their name in it."""
    root = artifact.directory
    paths = (path for path in sorted(root.rglob("*")) if path.is_file())
    files = {path.relative_to(root): path for path in paths}
    return {
        name.as_posix(): path
        for name, path in files.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def check_abi(found: Facts, files: Iterable[Path]) -> None:
    """Check that the programs and libraries among ``files`` are of a device's kind.

    Raises:
        InputError: The first that is not.
    """
    for path in files:
        with path.open("rb") as stream:
            head: Sequence[int] = stream.read(20)
        if bytes(head[:4]) != b"\x7fELF":
            continue
        machine = int.from_bytes(head[18:20], "little")
        if machine != ABIS.get(found.abi):
            name = {number: abi for abi, number in ABIS.items()}.get(machine, f"machine {machine}")
            raise InputError(
                f"{path}: built for {name}, but device {found.serial} is {found.abi}; "
                "build the runner for that"
            )
