"""The host machine: processor name, available memory and free disk."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

_UNLIMITED = 1 << 60


def available_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process may still use: available memory, or less under a control group.

    Args:
        proc: The proc file system; ``self/cgroup`` names the process's control groups.
        groups: Where the control groups are mounted, version 1 or 2.
    """
    import psutil

    left = int(psutil.virtual_memory().available)
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return left
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            left = min(left, _room(groups, path, "memory.max", "memory.current", "inactive_file"))
        elif "memory" in kinds.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            left = min(left, _room(groups / "memory", path, *names))
    return max(left, 0)


def _room(root: Path, path: str, limit: str, usage: str, cache: str) -> int:
    """Bytes left under the tightest limit of a control group and its parents.

    Inactive file pages count as used but can be reclaimed at once, so they are added back. A
    container that mounts its own group as the root has no directory at the group's path; the
    limits are then read from the root itself.
    """
    left = _UNLIMITED
    place = root / path.strip("/")
    for group in (place, *place.parents):
        if not group.is_relative_to(root):
            break
        try:
            most = (group / limit).read_text().strip()
            used = int((group / usage).read_text())
            facts = (line.split() for line in (group / "memory.stat").read_text().splitlines())
            back = next((int(value) for name, value in facts if name == cache), 0)
        except (OSError, ValueError):
            continue
        if most != "max":
            left = min(left, int(most) - used + back)
    return left


def free_disk(out: Path) -> int:
    """Free bytes on the disk that ``out`` will be written to."""
    out = out.absolute()
    return shutil.disk_usage(next(p for p in (out, *out.parents) if p.is_dir())).free


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
