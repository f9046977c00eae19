"""Android emulators by the SDK's own tools: made, started cold and headless, and always ended.

In ``home()``:
    avd/                the AVDs, apart from the user's own, because each start wipes its AVD
    emulator-PORT.json  what runs on a port and whom it belongs to (``Running``)
    emulator-PORT.log   what it said, until the next one on that port

An emulator belongs to the process that started it, and a pipe between the two ends it with that
process. What is left even so is stopped, or forgotten, by the next call of ``running``.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

import psutil
from pydantic import ValidationError

from caliport.android_harness.device.adb import Device, DeviceGone, adb
from caliport.android_harness.emulator.sdk import Image, Sdk, check_name, find_sdk
from caliport.core.errors import InputError
from caliport.validation.records.record import Record

PORTS = range(5554, 5586, 2)
"""Console ports; adb's is the next one. Beyond them an adb server looks for no emulator."""
_NATIVE = {"x86_64": "x86_64", "aarch64": "arm64-v8a", "arm64": "arm64-v8a"}
_ENDING = 10.0  # seconds for an emulator that is told to end
_POLL = 0.5  # seconds between two looks whether Android has booted
# The leader of a process group that ends with the emulator ("$@"), and with standard input unless
# that said "keep".
_GROUP = """
exec 3<&0 </dev/null
{ read -r word <&3; [ "$word" = keep ] || kill -9 0; } &
"$@" 3<&- &
exec 3<&-
wait $!
echo "exit code $?"
kill -9 0
"""


class Process(Record):
    """A process, told from a later one with its number.

    Attributes:
        pid: Its number.
        created: When it started, by this machine's clock, in seconds.
    """

    pid: int
    created: float

    def alive(self) -> bool:
        """Whether it has not ended."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < 1
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class Running(Record):
    """An emulator that runs or is about to.

    Attributes:
        avd: Its AVD.
        port: Its console port.
        ram: Its memory in MiB.
        owner: The process that it ends with; None if it stays until it is stopped.
        leader: Of its process group; None before there is one.
    """

    avd: str
    port: int
    ram: int
    owner: Process | None
    leader: Process | None = None

    @property
    def serial(self) -> str:
        """What adb names it."""
        return f"emulator-{self.port}"

    @property
    def log(self) -> Path:
        """The file of what it said."""
        return home() / f"{self.serial}.log"

    @property
    def file(self) -> Path:
        """Where this is written."""
        return home() / f"{self.serial}.json"

    def stop(self) -> None:
        """End it, with all that it started, and forget it.

        Raises:
            InputError: It does not end.
        """
        leader = self.leader
        if leader is not None and leader.alive():
            told = False
            with suppress(TimeoutError):
                told = adb(["-s", self.serial, "emu", "kill"], _ENDING).code == 0
            if not (told and _until(lambda: not leader.alive())):
                with suppress(ProcessLookupError):
                    os.killpg(leader.pid, signal.SIGKILL)
                if not _until(lambda: not leader.alive()):
                    raise InputError(f"{self.serial}: process {leader.pid} does not end; kill it")
        self.file.unlink(missing_ok=True)

    def trouble(self, what: str) -> InputError:
        """An error that shows the last lines of its log."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        said = " | ".join(lines[-4:])[-400:] or "nothing"
        return InputError(f"{self.serial}: {what}; it said: {said} ({self.log})")


def home() -> Path:
    """Where AVDs and what is known of running emulators lie."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "caliport/emulators"


def avds() -> dict[str, Image]:
    """The AVDs that ``create`` made, by name."""
    names = [path.stem for path in sorted(_place().glob("*.ini"))]
    return {name: image for name in names if (image := _image_of(name)) is not None}


def running() -> list[Running]:
    """The emulators that run; one that lost its owner is stopped first."""
    found = []
    for path in sorted(home().glob("emulator-*.json")):
        try:
            one = Running.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError):
            path.unlink(missing_ok=True)
            continue
        lost = one.owner is not None and not one.owner.alive()
        if lost or (one.leader is not None and not one.leader.alive()):
            one.stop()
        else:
            found.append(one)
    return found


def native_abi() -> str:
    """The only ABI that emulators here have: this machine's own."""
    return _NATIVE.get(platform.machine(), platform.machine())


def create(name: str, image: Image, *, install: bool = False) -> bool:
    """Make an AVD, in place of one of that name with another image.

    Args:
        name: Of letters, digits, ``_``, ``.`` and ``-``.
        image: What it boots.
        install: Let ``sdkmanager`` install what is missing; it may ask to accept licences.

    Returns:
        Whether it had to be made.

    Raises:
        InputError: An ABI that no emulator here has, parts of the SDK are missing, an emulator runs
            the AVD, or it could not be made.
    """
    check_name("AVD", name)
    if image.abi != native_abi():
        raise InputError(f"ABI {image.abi}: emulators have this machine's own, {native_abi()}")
    sdk = find_sdk(image, _place(), install=install)
    if _image_of(name) == image:
        return False
    _check_idle(name)
    _place().mkdir(mode=0o700, parents=True, exist_ok=True)
    command = ("create", "avd", "--force", "--name", name, "--package", image.package)
    # "no" answers whether to make a hardware profile
    code, said = sdk.ask(sdk.tool("avdmanager"), *command, answers="no\n")
    if code or _image_of(name) != image:
        raise InputError(f"avdmanager: {said}; expected it to make AVD {name}")
    return True


@contextmanager
def booted(
    name: str,
    *,
    port: int | None = None,
    ram: int = 4096,
    accelerated: bool = True,
    seconds: float = 600,
    keep: bool = False,
) -> Iterator[Running]:
    """Start an emulator, wiped and without a window, and wait until Android has booted.

    Args:
        name: An AVD that ``create`` made.
        port: Its console port, of ``PORTS``; None takes the first that is free.
        ram: Its memory in MiB.
        accelerated: Whether it uses the processor's virtualization, KVM on Linux.
        seconds: The longest that it may take to boot.
        keep: Once booted, leave it running beyond this process; else it is stopped at the end.

    Raises:
        InputError: No such AVD, or an emulator runs it; a port that is taken; parts of the SDK or
            acceleration are missing; or the emulator ends or does not boot in time.
    """
    check_name("AVD", name)
    image = _image_of(name)
    if image is None:
        made = ", ".join(avds()) or "none"
        raise InputError(f"AVD {name}: not made yet, found {made}; caliport emulator create")
    sdk = find_sdk(image, _place())
    if accelerated:
        sdk.check_acceleration()
    _check_idle(name)
    one = _claim(name, port, ram)
    try:
        pipe, leader = _launch(sdk, one, accelerated)
    except BaseException:
        one.stop()
        raise
    with ExitStack() as ending:
        ending.callback(pipe.close)
        one = one.model_copy(update={"leader": leader})
        ending.callback(one.stop)  # before the pipe is closed, which ends it less gently
        _write(one)
        _wait_for_boot(one, leader, seconds)
        if keep:
            _write(one.model_copy(update={"owner": None}))
            pipe.write(b"keep\n")
            ending.pop_all()
        yield one


def _place() -> Path:
    return home() / "avd"


def _check_idle(name: str) -> None:
    for one in running():
        if one.avd == name:
            raise InputError(f"AVD {name}: runs as {one.serial}; stop it, or choose another --name")


def _image_of(name: str) -> Image | None:
    """What an AVD boots; None if it is not there, or not whole."""
    try:
        (_place() / f"{name}.ini").stat()
        text = (_place() / f"{name}.avd/config.ini").read_text(encoding="utf-8")
    except OSError:
        return None
    pattern = r"^image\.sysdir\.1 *= *system-images/android-([^/]+)/([^/]+)/([^/\s]+)"
    found = re.search(pattern, text, re.MULTILINE)
    return None if found is None else Image(*found.groups())


def _claim(name: str, port: int | None, ram: int) -> Running:
    """Take a port, before anything listens there."""
    if port is not None and port not in PORTS:
        raise InputError(f"port {port}: expected an even one from {PORTS[0]} to {PORTS[-1]}")
    me = Process(pid=os.getpid(), created=psutil.Process().create_time())
    for number in PORTS if port is None else (port,):
        one = Running(avd=name, port=number, ram=ram, owner=me)
        if _free(number) and _write(one, new=True):
            return one
    if port is None:
        raise InputError(f"ports {PORTS[0]} to {PORTS[-1]}: all are taken; stop an emulator")
    raise InputError(f"port {port}: taken; without --port a free one is chosen")


def _free(port: int) -> bool:
    """Whether nothing listens on a console port and on adb's beside it."""
    for number in (port, port + 1):
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(("127.0.0.1", number))
            except OSError:
                return False
    return True


def _write(one: Running, *, new: bool = False) -> bool:
    """Write a record, whole; False if it is to be ``new`` and its port has one."""
    with TemporaryDirectory(dir=home(), prefix=".") as place:
        whole = Path(place) / "record"
        whole.write_text(one.model_dump_json(), encoding="utf-8")
        if not new:
            whole.replace(one.file)
            return True
        try:
            os.link(whole, one.file)
        except FileExistsError:
            return False
        return True


def _launch(sdk: Sdk, one: Running, accelerated: bool) -> tuple[IO[bytes], Process]:
    """Start an emulator; the pipe that it ends with, and the leader of its process group."""
    for lock in (_place() / f"{one.avd}.avd").glob("*.lock"):  # of one that was killed
        lock.unlink(missing_ok=True)
    command = [sdk.emulator, "-avd", one.avd, "-port", str(one.port), "-memory", str(one.ram)]
    command += ["-accel", "on" if accelerated else "off", "-gpu", "swiftshader_indirect"]
    command += ["-no-window", "-no-audio", "-no-boot-anim", "-no-snapshot", "-wipe-data"]
    with one.log.open("wb") as log:
        process = subprocess.Popen(
            ["sh", "-c", _GROUP, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=sdk.environment(),
            start_new_session=True,
            bufsize=0,
        )
    assert process.stdin is not None
    created = psutil.Process(process.pid).create_time()
    return process.stdin, Process(pid=process.pid, created=created)


def _wait_for_boot(one: Running, leader: Process, seconds: float) -> None:
    until = time.monotonic() + seconds
    device = Device(one.serial)
    while True:
        with suppress(DeviceGone, TimeoutError):  # not there yet, or does not answer yet
            if device.shell(["getprop", "sys.boot_completed"], 10).out.strip() == "1":
                return
        if not leader.alive():
            raise one.trouble("ended before it had booted")
        if time.monotonic() > until:
            raise one.trouble(f"not booted within {seconds:g} s")
        time.sleep(_POLL)


def _until(done: Callable[[], bool]) -> bool:
    """Whether something comes true in time."""
    until = time.monotonic() + _ENDING
    while not done():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True
