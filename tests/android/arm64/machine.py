"""An emulated ARM64 machine that runs Linux and an adb daemon, for as long as it is needed.

QEMU's ``virt`` board with Debian's kernel. Its root file system lies in memory and holds busybox,
``adbd`` and what that is linked to, from Debian packages that are unpacked and never installed.
"""

from __future__ import annotations

import gzip
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from caliport.android_harness.toolchain.packages import fetch_packages

KERNELS = "bookworm"  # its kernels are plain images, which QEMU 7.2 can start
USERLAND = "trixie"  # the first with adbd
MODULES = ("virtio_pci", "virtio_net")
READY = "caliport: adbd listens"
_SECONDS = 90.0
_PORT = 5555
_INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin HOME=/ ADBD_PORT={_PORT}
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mkdir -p /dev/pts /data /tmp
mount -t devpts none /dev/pts
mount -t tmpfs none /data
mkdir -p /data/local/tmp
for module in /modules/*; do insmod "$module"; done
ip link set lo up
ip link set eth0 up
ip address add 10.0.2.15/24 dev eth0
adbd > /adbd.log 2>&1 &
until netstat -ltn | grep -q :{_PORT}; do sleep 0.1; done
echo {READY} > /dev/ttyAMA0
wait
"""


@contextmanager
def arm64_machine(cache: Path, cpu: str = "neoverse-n1") -> Iterator[str]:
    """Start the machine; yields its daemon's address for ``adb connect``; ends it.

    Only the daemon's port leads in, from this computer's loopback, and nothing leads out.

    Args:
        cache: Where the unpacked packages are kept.
        cpu: QEMU's name of the processor.
    """
    kernel, root = _files(cache)
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "root.gz"
        image.write_bytes(gzip.compress(_root(kernel, root, Path(folder) / "root"), 1))
        (start,) = kernel.glob("boot/vmlinuz-*")
        console = Path(folder) / "console"
        port = free_port()
        machine = subprocess.Popen(
            [
                *("qemu-system-aarch64", "-M", "virt", "-cpu", cpu, "-smp", "2", "-m", "1024"),
                *("-display", "none", "-monitor", "none", "-serial", f"file:{console}"),
                *("-kernel", str(start), "-initrd", str(image), "-append", "console=ttyAMA0 quiet"),
                "-netdev",
                f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:{_PORT}",
                *("-device", "virtio-net-pci,netdev=net,romfile="),
            ],
            stdin=subprocess.DEVNULL,
        )
        try:
            _wait(machine, console)
            yield f"127.0.0.1:{port}"
        finally:
            machine.kill()
            machine.wait()


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _files(cache: Path) -> tuple[Path, Path]:
    """Roots with the kernel's package and with the userland's, dependencies included."""
    kernel = fetch_packages(
        ["linux-image-cloud-arm64"], KERNELS, "arm64", cache / "arm64-kernel", dependencies=True
    )
    names = ["adbd", "busybox-static"]
    return kernel, fetch_packages(names, USERLAND, "arm64", cache / "arm64", dependencies=True)


def _wait(machine: subprocess.Popen[bytes], console: Path) -> None:
    """Until the daemon listens."""
    end = time.monotonic() + _SECONDS
    while True:
        said = console.read_text(errors="replace") if console.exists() else ""
        if READY in said:
            return
        if machine.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the machine did not start; its console said: {said[-2000:]}")
        time.sleep(0.1)


def _root(kernel: Path, userland: Path, place: Path) -> bytes:
    """A root file system as the kernel takes it (a cpio archive), built at ``place``."""
    for folder in ("bin", "proc", "sys", "dev", "modules", "usr/lib"):
        (place / folder).mkdir(parents=True)
    (place / "lib").symlink_to("usr/lib")
    for program in ("usr/bin/busybox", "usr/sbin/adbd"):
        shutil.copy2(userland / program, place / "bin")
    for library in userland.rglob("*.so*"):
        if library.is_file() and library.read_bytes()[:4] == b"\x7fELF":
            parent = place / "usr" / library.parent.relative_to(userland / "usr")
            parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(library, parent / library.name)
    for number, module in enumerate(_modules(kernel)):
        (place / "modules" / f"{number:02}.ko").write_bytes(module)
    (place / "init").write_text(_INIT, encoding="utf-8")
    (place / "init").chmod(0o755)
    names = "\n".join(str(p.relative_to(place)) for p in sorted(place.rglob("*")))
    done = subprocess.run(
        ["cpio", "--create", "--format=newc", "--owner=0:0", "--quiet"],
        cwd=place,
        input=names.encode(),
        capture_output=True,
        check=True,
    )
    return done.stdout


def _modules(kernel: Path) -> list[bytes]:
    """Kernel modules, those that others depend on first; what is built in needs none."""
    files = {path.stem: path for path in kernel.rglob("*.ko")}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        name = name if name in files else name.replace("_", "-")
        if name not in files or name in ordered:
            return
        data = files[name].read_bytes()
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for other in depends[1].decode().split(",") if depends else []:
            add(other)
        ordered[name] = data

    for module in MODULES:
        add(module)
    return list(ordered.values())
