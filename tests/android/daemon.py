"""A device without a phone: Debian's real adbd in a root, processes and network of its own.

``python tests/android/daemon.py`` fetches adbd. A ``Daemon`` is a device: it has a file system
with programs of this machine, read-only, a ``/data/local/tmp`` of a chosen size, Android's user for
a shell, and stand-ins for ``getprop`` and ``dumpsys`` that say what is written in ``facts``.
``private_network`` takes the calling thread, and what it starts, out of the machine's network, so
that the daemons, which listen everywhere, are reached by nobody else.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from caliport.android_harness.toolchain.packages import fetch_packages

PROJECT = Path(__file__).parents[2]
CACHE = PROJECT / "build/adbd"
_ADBD = (
    "adbd",
    "android-libbase",
    "android-libboringssl",
    "android-libcutils",
    "android-liblog",
)
_LIBRARIES = ("libbrotli1", "libprotobuf32")  # its others are there where apt is
_DEBIAN = {"x86_64": "amd64", "aarch64": "arm64"}
_SHELL = "2000"  # Android's user and group of that name
_NETWORK = 0x40000000  # CLONE_NEWNET
# $1 the root, $2 the size of its /data/local/tmp, $3 stand-ins, $4 adbd, $5 and so on: also seen
_BUILD = """
set -e
root=$1 size=$2 system=$3 adbd=$4; shift 4
mount -t tmpfs -o mode=755 root "$root"
for place in "$@" /bin /sbin /lib /lib64 /usr /etc /sys; do
  [ -e "$place" ] || continue
  mkdir -p "$root$place"
  mount --rbind "$place" "$root$place"
  mount -o remount,bind,ro "$root$place"
done
mkdir -p "$root/system" "$root/adbd" "$root/proc" "$root/dev" "$root/tmp" "$root/data/local/tmp"
mount --bind "$system" "$root/system"
mount --bind "$adbd" "$root/adbd"
mount -t proc proc "$root/proc"
[ ! -e "$system/cpuinfo" ] || mount --bind "$system/cpuinfo" "$root/proc/cpuinfo"
for node in null zero random urandom; do
  touch "$root/dev/$node"
  mount --bind "/dev/$node" "$root/dev/$node"
done
mount -t tmpfs -o "size=$size,mode=771,uid=2000,gid=2000" data "$root/data/local/tmp"
echo built
exec chroot "$root" /bin/sh -c 'while :; do sleep 1000 & wait; done'
"""
_GETPROP = """#!/bin/sh
sed -n "s/^$1=//p" /system/properties
"""
_DUMPSYS = """#!/bin/sh
cat "/system/dumpsys-$1"
"""


def fetch() -> Path:
    """Debian's adbd and its libraries, unpacked; fetched once."""
    architecture = _DEBIAN[platform.machine()]
    fetch_packages(_LIBRARIES, "bookworm", architecture, CACHE / "libraries")
    fetch_packages(_ADBD, "bookworm-backports", architecture, CACHE / "adbd")
    return CACHE


@contextmanager
def private_network() -> Iterator[None]:
    """A network of this thread's own, which reaches nothing but itself."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/self/task/{threading.get_native_id()}/ns/net", encoding="ascii") as before:
        if libc.unshare(_NETWORK):
            raise PermissionError(
                f"a network namespace: {os.strerror(ctypes.get_errno())}; tests/android need root "
                "on Linux (make test ANDROID=no leaves them out)"
            )
        try:
            with socket.socket() as any_socket:  # ifconfig lo up
                fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 1 | 64))
            yield
        finally:
            libc.setns(before.fileno(), _NETWORK)


class Daemon:
    """One device.

    Attributes:
        address: What to connect adb to, and its serial then.
        port: Of it.
        facts: A directory: ``properties`` as lines NAME=VALUE, and ``dumpsys-SERVICE``.
    """

    def __init__(self, place: Path, port: int, *, size: str = "256m", cpuinfo: str = "") -> None:
        self._root, self.facts = place / "root", place / "system"
        self._root.mkdir(parents=True)
        (self.facts / "bin").mkdir(parents=True)
        for name, text in {"getprop": _GETPROP, "dumpsys": _DUMPSYS}.items():
            (self.facts / "bin" / name).write_text(text, encoding="utf-8")
            (self.facts / "bin" / name).chmod(0o755)
        if cpuinfo:
            (self.facts / "cpuinfo").write_text(cpuinfo, encoding="utf-8")
        self.port = port
        self.address = f"127.0.0.1:{port}"
        self._daemon: subprocess.Popen[bytes] | None = None
        dies_with_us = ["setpriv", "--pdeathsig", "KILL"]
        command = [
            *dies_with_us,
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "sh",
            "-c",
            _BUILD,
        ]
        seen = [str(PROJECT), sys.base_prefix]
        self._machine = subprocess.Popen(
            [*command, "sh", str(self._root), size, str(self.facts), str(CACHE), *seen],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self._machine.stdout is not None
        assert self._machine.stdout.readline() == b"built\n"
        (self._init,) = psutil.Process(self._machine.pid).children()

    def start(self) -> None:
        """Start adbd, if it does not run, and wait until it listens."""
        if self._daemon is not None and self._daemon.poll() is None:
            return
        enter = ["nsenter", "--target", str(self._init.pid), "--mount", "--pid", "--root", "--wd"]
        user = ["setpriv", "--reuid", _SHELL, "--regid", _SHELL, "--clear-groups"]
        folders = {path.parent for path in CACHE.rglob("lib*.so*")}
        inside = [f"/adbd/{folder.relative_to(CACHE)}" for folder in sorted(folders)]
        (program,) = CACHE.rglob("platform-tools/adbd")
        self._daemon = subprocess.Popen(
            [*enter, *user, f"/adbd/{program.relative_to(CACHE)}"],
            env={
                "ADBD_PORT": str(self.port),
                "LD_LIBRARY_PATH": ":".join(inside),
                "PATH": "/system/bin:/usr/bin:/bin",
                "HOME": "/data/local/tmp",
                "TMPDIR": "/data/local/tmp",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(lambda: _listens(self.port))

    def signal(self, number: int) -> None:
        """Send adbd a signal; SIGKILL is also waited for."""
        assert self._daemon is not None
        for process in self.processes("adbd"):
            process.send_signal(number)
        if number == signal.SIGCONT:
            self._daemon.send_signal(number)  # nsenter stops with what it started
        if number == signal.SIGKILL:
            self._daemon.wait()

    def path(self, name: str) -> Path:
        """A file or directory of the device as this machine sees it."""
        return Path(f"/proc/{self._init.pid}/root{name}")

    def processes(self, name: str = "") -> list[psutil.Process]:
        """What runs on the device, zombies and its first processes left out."""
        space = os.readlink(f"/proc/{self._init.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            try:
                inside = os.readlink(f"/proc/{process.pid}/ns/pid") == space
                command, called = process.cmdline(), process.name()
            except (OSError, psutil.Error):
                continue  # it has just ended
            first = process == self._init or command == ["sleep", "1000"]
            if inside and command and not first and name in called:
                found.append(process)
        return found

    def mount(self, *options: str) -> None:
        """Mount ``/data/local/tmp`` again with other options."""
        enter = ["nsenter", "--target", str(self._init.pid), "--mount", "--root"]
        command = ["mount", "-o", ",".join(("remount", *options)), "/data/local/tmp"]
        subprocess.run([*enter, *command], check=True)

    def stop(self) -> None:
        """End the device and all that runs on it; its mounts and files go with it."""
        self._init.kill()
        self._machine.wait()
        assert list(self._root.iterdir()) == []
        if self._daemon is not None:
            self._daemon.wait()
        assert self._machine.stdout is not None
        self._machine.stdout.close()


def wait_for(true: Callable[[], object], seconds: float = 10) -> None:
    """Wait until something is true."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"not so within {seconds:g} s"
        time.sleep(0.01)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    fetch()
