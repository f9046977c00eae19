"""Android's own adb, which comes with ``adbutils``: what it sees, and shell, push and pull.

Every call ends within its time. The adb server that a first call starts goes on, as it does with
adb itself; ``ANDROID_ADB_SERVER_PORT`` names another port than 5037 for it.
"""

from __future__ import annotations

import os
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from caliport.core.errors import InputError, one_line

NO_DEVICE = "adb sees no device; connect one with USB debugging allowed, or start an emulator"
_SECONDS = 20.0  # for what a healthy device answers at once
_MOST = 1 << 27  # bytes of output and errors; a result has at most half as many
_SLOWEST = 1e6  # bytes a second of a cable
_END = "caliport-exit-code:"
_REMEDIES = {
    "offline": "reconnect or restart it",
    "unauthorized": "accept this computer's key on its screen",
    "authorizing": "accept this computer's key on its screen",
    "no permissions": "allow this user the USB device (on Linux by a udev rule)",
}


class DeviceGone(InputError):
    """A device did not answer any more.

    Attributes:
        state: What adb says of it now; None if it does not see it or was not asked.
    """

    def __init__(self, message: str, state: str | None = None) -> None:
        super().__init__(message)
        self.state = state


@dataclass(frozen=True)
class Completed:
    """What a command did.

    Attributes:
        code: Its exit code.
        out: Its standard output.
        err: Its standard error.
    """

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Listed:
    """A line of ``adb devices``.

    Attributes:
        serial: What adb names the device.
        state: ``device`` if it can be used, else such as ``offline`` or ``unauthorized``.
    """

    serial: str
    state: str

    def trouble(self) -> str | None:
        """Why it cannot be used, in one line; None if it can."""
        if self.state == "device":
            return None
        remedy = _REMEDIES.get(self.state, "start Android on it")
        return f"device {self.serial}: found {self.state!r}, expected 'device'; {remedy}"


@cache
def _binary() -> str:
    from adbutils import adb_path

    return adb_path()


def adb(
    arguments: Sequence[str], seconds: float = _SECONDS, *, stdin: int = subprocess.DEVNULL
) -> Completed:
    """Run adb; it is killed when the time is over and when this process is interrupted.

    Args:
        arguments: After ``adb``.
        seconds: The longest that it may take.
        stdin: A file descriptor.

    Raises:
        TimeoutError: It took longer.
        InputError: It writes more than any answer has.
    """
    with subprocess.Popen(
        [_binary(), *arguments],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            what = f"adb {one_line(shlex.join(arguments), 200)}"
            out, err = _said(process, time.monotonic() + seconds, what)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError(f"adb {shlex.join(arguments)}: over {seconds:g} s") from None
            raise
    return Completed(process.returncode, out, err)


def _said(process: subprocess.Popen[bytes], until: float, what: str) -> list[str]:
    """What a process writes to its output and errors until it ends, as text."""
    said = {process.stdout: bytearray(), process.stderr: bytearray()}
    with selectors.DefaultSelector() as streams:
        for stream in said:
            assert stream is not None
            streams.register(stream, selectors.EVENT_READ)
        while streams.get_map():
            left = until - time.monotonic()
            ready = streams.select(left) if left > 0 else []
            if not ready:
                raise subprocess.TimeoutExpired(process.args, left)
            for key, _ in ready:
                part = os.read(key.fd, 1 << 16)
                if not part:
                    streams.unregister(key.fileobj)
                said[key.fileobj] += part  # type: ignore[index]
                if sum(map(len, said.values())) > _MOST:
                    raise InputError(f"{what}: over {_MOST >> 20} MiB of output, expected less")
    process.wait(max(0.0, until - time.monotonic()))
    return [
        part.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
        for part in said.values()
    ]


def listed() -> list[Listed]:
    """What adb sees, usable or not.

    Raises:
        InputError: There is no adb server, and none could be started.
    """
    port = os.environ.get("ANDROID_ADB_SERVER_PORT", "5037")
    try:
        done = adb(["devices"], _SECONDS)
    except TimeoutError:
        done = Completed(1, "", "no answer")
    lines = done.out.splitlines()
    if done.code or "List of devices attached" not in lines:
        said = _last_line(done.err)
        raise InputError(
            f"adb server on port {port}: {said}; if another program holds that port, "
            "name a free one by ANDROID_ADB_SERVER_PORT"
        )
    rows = (line.split("\t") for line in lines if "\t" in line)
    return [Listed(serial, state.split(" (")[0].split(";")[0]) for serial, state, *_ in rows]


def connect(address: str) -> None:
    """Connect to a device over the network.

    Args:
        address: ``HOST:PORT``.

    Raises:
        InputError: Nothing answers there.
    """
    try:
        done = adb(["connect", address])
    except TimeoutError:
        done = Completed(1, "no answer", "")
    if "connected to" not in done.out:
        said = _last_line(done.out + done.err)
        raise InputError(f"{address}: {said}; expected an adb daemon that listens there")


@dataclass(frozen=True)
class Device:
    """One device that adb sees.

    Attributes:
        serial: What adb names it.
    """

    serial: str

    def shell(
        self, argv: Sequence[str], seconds: float = _SECONDS, *, stdin: int = subprocess.DEVNULL
    ) -> Completed:
        """Run a command on the device; nothing in ``argv`` is interpreted by its shell.

        Args:
            argv: The command and its arguments.
            seconds: The longest that it may take.
            stdin: A file descriptor on this side; the command sees its end.

        Raises:
            TimeoutError: It took longer; what it started on the device may go on.
            DeviceGone: The device went away before the command had ended.
        """
        # adb's own exit code also stands for a lost connection: the device says the command's.
        line = f"{shlex.join(argv)}; code=$?; echo; echo {_END}$code"
        done = adb(["-s", self.serial, "shell", line], seconds, stdin=stdin)
        out, end, code = done.out.replace("\r\n", "\n").rpartition(f"\n{_END}")
        if not end or not code.strip().isdecimal():
            raise self._gone(done)
        return Completed(int(code), out, done.err)

    def script(self, text: str, *arguments: str, seconds: float = _SECONDS) -> Completed:
        """Run a ``sh`` script on the device, its arguments in ``$1`` and so on; see ``shell``.

        Raises:
            DeviceGone: The device went away, or took too long for something short.
        """
        try:
            return self.shell(["sh", "-c", text, "sh", *arguments], seconds)
        except TimeoutError:
            raise DeviceGone(f"device {self.serial}: no answer within {seconds:g} s") from None

    def push(self, local: Path, remote: str) -> None:
        """Copy a file to the device.

        Raises:
            InputError: It could not be read or written.
            DeviceGone: The device went away.
        """
        self._copy(["push", str(local), remote], remote, local.stat().st_size)

    def pull(self, remote: str, local: Path, size: int = 0) -> None:
        """Copy a file from the device; ``size`` is about its bytes.

        Raises:
            InputError: It could not be read or written.
            DeviceGone: The device went away.
        """
        self._copy(["pull", remote, str(local)], remote, size)

    def exists(self, remote: str) -> bool:
        """Whether there is a file or directory of that name."""
        return self.shell(["test", "-e", remote]).code == 0

    def _copy(self, arguments: list[str], remote: str, size: int) -> None:
        seconds = _SECONDS + size / _SLOWEST
        try:
            done = adb(["-s", self.serial, *arguments], seconds)
        except TimeoutError:
            raise DeviceGone(
                f"device {self.serial}: {remote} not copied within {seconds:.0f} s"
            ) from None
        if done.code:
            if (gone := self._gone(done)).state != "device":
                raise gone
            reason = _last_line(done.err + done.out).rpartition(": ")[2]
            raise InputError(f"device {self.serial}: {remote}: {reason}")

    def _gone(self, done: Completed) -> DeviceGone:
        """What to say when a call came to nothing."""
        state = next((d.state for d in listed() if d.serial == self.serial), None)
        said = _last_line(done.err) if done.err.strip() else "the connection was lost"
        found = "not connected any more" if state is None else f"now {state!r}"
        return DeviceGone(f"device {self.serial}: {found} ({said}); reconnect it", state)


def _last_line(text: str) -> str:
    """What adb complains of last; it also says how a copy went on."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("adb: ", "error: "))] or lines
    return errors[-1].removeprefix("adb: ").removeprefix("error: ") if errors else "no answer"
