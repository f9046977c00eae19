"""A device for oneself: a lease, files by their content, programs that end; all of it removed.

On the device, in ``ROOT/caliport``:
    lease         who has the device, and until when (``Lease``); renewed by every call
    store/HASH/   files that were pushed together, under the hash of their names and contents
    SESSION/      job, result and output of one session
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from pydantic import ValidationError

from caliport.android_harness.device.adb import Completed, Device
from caliport.android_harness.device.facts import ROOT, parse_space
from caliport.core.errors import InputError
from caliport.core.files import file_hash
from caliport.validation.records.record import RECORD_BYTES, Record

HOME = f"{ROOT}/caliport"
_STORE = f"{HOME}/store"
_LEASE = f"{HOME}/lease"
_IDLE = 600.0  # seconds that a lease outlives its last renewal
_GRACE = 30.0  # seconds that the device waits longer than its host before it ends a program itself
_SPARE = 4 << 20  # bytes for a job, its result and a file system's own
_HASHED = 20e6  # bytes a second, of a slow phone
_ENDED = 5.0  # seconds in which a killed program must be gone
_LEADER = "caliport-group"  # tells a group's leader from another process with its number

# $1 what the lease says now, $2 what it should say, $3 an unused name
_TAKE = f"""
cd {HOME} || exit
if [ -e lease ]; then
  [ "$(cat lease)" = "$1" ] && mv lease "$3" || exit
fi
set -C; printf %s "$2" > lease
"""
_RENEW = (
    f'cd {HOME} && [ "$(cat lease)" = "$1" ] && printf %s "$2" > lease.new && mv lease.new lease'
)
# $1 what the lease says if it is still ours, $2 what is ours in any case, $3 what is with the lease
_GIVE_BACK = f"""
rm -rf "$2"
[ "$(cat {_LEASE} 2>/dev/null)" = "$1" ] || exit 0
rm -rf "$3"
rm -f {_LEASE}
rmdir {HOME} 2>/dev/null
exit 0
"""
# $1 a directory of the store
_LOOK = f"""
cd {_STORE}/"$1" 2>/dev/null && find . -type f -exec sha256sum {{}} +
df -k {ROOT}
"""
# $1 a directory, $2 how a program is run, $3 and so on: its arguments. Its exit code outlives it.
_START = """
cd "$1" && rm -f code out err || exit 125
shift
setsid sh -c "$@"
ended=$?
cat err >&2
code=$(cat code 2>/dev/null)
exit "${code:-$ended}"
"""
# In a process group of its own, which ends with the program, with the connection to the host (the
# end of standard input), and after $1 seconds. Libraries write into a home too: ONNX Runtime leaves
# an id of the device there.
_GROUP = """
limit=$1; shift
echo $$ > pid
exec 3<&0
HOME=$PWD TMPDIR=$PWD "$@" 3<&- > out 2> err < /dev/null &
program=$!
{ cat <&3 > /dev/null; kill -9 0; } &
{ sleep "$limit"; kill -9 0; } 3<&- &
wait $program
echo $? > code
kill -9 0
"""
# $1 a directory: the groups started in it, then every program and where it works
_PROGRAMS = f"""
for file in "$1"/pid "$1"/*/pid; do
  pid=$(cat "$file" 2>/dev/null) || continue
  grep -qs {_LEADER} "/proc/$pid/cmdline" && echo "/proc/$pid/cwd -> $1"
done
ls -l /proc/[0-9]*/cwd 2>/dev/null
exit 0
"""


class Lease(Record):
    """Who has a device. Times are seconds of the device's clock.

    Attributes:
        session: Its name, random.
        host: The computer.
        pid: The process on it.
        created: When that process started, by the host's clock: a later one may have its number.
        start: When the session did.
        heartbeat: When it was last renewed.
        expiry: From when on anybody may take the device.
    """

    session: str
    host: str
    pid: int
    created: float
    start: float
    heartbeat: float
    expiry: float

    def holds(self, now: float) -> bool:
        """Whether it is to be honoured at a time of the device's clock."""
        return now < self.expiry and (self.host != platform.node() or self._alive())

    def _alive(self) -> bool:
        if self.pid == os.getpid():
            return self.session in _OPEN
        try:
            return abs(psutil.Process(self.pid).create_time() - self.created) < 1
        except psutil.NoSuchProcess:
            return False


_OPEN: set[str] = set()
"""Sessions of this process."""


@contextmanager
def session(device: Device, *, keep: bool = False) -> Iterator[Session]:
    """Have a device for oneself; what a session that died has left there is removed first.

    Args:
        device: The device.
        keep: Leave the files that were pushed, for a later session to use.

    Raises:
        InputError: Somebody else has it, or its directory cannot be written.
    """
    held = Session(device)
    held.open()
    try:
        yield held
    except BaseException:
        with suppress(InputError):  # it has its reason, which is more than that cleaning failed
            held.close(keep)
        raise
    finally:
        _OPEN.discard(held.name)
    held.close(keep)


class Session:
    """A device that this process has for itself; made by ``session``.

    Attributes:
        device: The device.
        name: Random.
        place: The session's directory on the device.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.name = uuid.uuid4().hex[:12]
        self.place = f"{HOME}/{self.name}"
        self._lease = ""  # as it stands on the device
        self._start = self._ahead = 0.0  # by the device's clock; what it is ahead of this one
        self._stored: dict[str, str] = {}  # where files lie on the device, by their hash

    def open(self) -> None:
        """Take the device."""
        done = self.device.script(f"cd {ROOT} && umask 077 && mkdir -p caliport/store && date +%s")
        if done.code:
            reason = done.err.strip().rpartition(": ")[2]
            raise InputError(
                f"device {self.device.serial}: {HOME}: {reason}; expected to be able to write there"
            )
        self._start = float(done.out.split()[-1])
        self._ahead = self._start - time.time()
        stands = self.device.script(f"cat {_LEASE} 2>/dev/null").out
        other = _parse(stands)
        if other is not None and other.holds(self._start):
            raise self._busy(f"by process {other.pid} on {other.host}", other.expiry - self._start)
        lease = self._renewed(0)
        if self.device.script(_TAKE, stands, lease, f"{self.name}.old").code:
            raise self._busy("by a session that was faster", _IDLE)
        self._lease = lease
        _OPEN.add(self.name)
        kill_programs(self.device, HOME)
        self._script(
            f'cd {HOME} && for entry in *; do case $entry in store|lease);; *) rm -rf "$entry";; '
            f'esac; done && mkdir "$1"',
            self.place,
        )

    def close(self, keep: bool) -> None:
        """Give the device back, with nothing left on it but, if wanted, what was pushed."""
        kill_programs(self.device, self.place)
        store = "" if keep else _STORE
        self._script(_GIVE_BACK, self._lease, self.place, store)

    def _busy(self, who: str, seconds: float) -> InputError:
        return InputError(
            f"device {self.device.serial}: in use {who}, for at most {seconds:.0f} s more; "
            "wait, or choose another device"
        )

    def _renewed(self, seconds: float) -> str:
        now = time.time() + self._ahead
        lease = Lease(
            session=self.name,
            host=platform.node(),
            pid=os.getpid(),
            created=psutil.Process().create_time(),
            start=self._start,
            heartbeat=now,
            expiry=now + _IDLE + seconds,
        )
        return lease.model_dump_json()

    def _renew(self, seconds: float = 0) -> None:
        """Make the lease outlive something that takes so long."""
        lease = self._renewed(seconds)
        if self.device.script(_RENEW, self._lease, lease).code:
            raise InputError(
                f"device {self.device.serial}: another session took it after {_IDLE:.0f} s without "
                "a sign of this one; start again"
            )
        self._lease = lease

    def put(self, files: Mapping[str, Path]) -> str:
        """Bring files to the device, those that it does not have.

        Args:
            files: By the names they get there, which may name folders.

        Returns:
            The directory that holds them, as seen from ``place``. Nobody may write there.

        Raises:
            InputError: Too little space, or a file that arrives otherwise than it was here.
        """
        self._renew()
        wanted = {name: file_hash(path) for name, path in files.items()}
        text = "".join(f"{wanted[name]}  {name}\n" for name in sorted(wanted))
        tree = hashlib.sha256(text.encode()).hexdigest()
        size = sum(path.stat().st_size for path in files.values())
        there, free = self._look(tree, size)
        if there != wanted:
            partial = f"{tree}.part"
            begun, _ = self._look(partial, size)
            missing = {
                name: path for name, path in files.items() if begun.get(name) != wanted[name]
            }
            self._stored = {d: p for d, p in self._stored.items() if not p.startswith(tree)}
            self._bring(partial, missing, wanted, free)
            self._check(self._look(partial, size)[0], files, wanted)
            self._script(f'cd {_STORE} && rm -rf "$1" && mv "$2" "$1"', tree, partial)
        self._stored |= {digest: f"{tree}/{name}" for name, digest in wanted.items()}
        return f"../store/{tree}"

    def _bring(
        self, tree: str, files: Mapping[str, Path], wanted: Mapping[str, str], free: int
    ) -> None:
        """Push files into a directory of the store, or copy them where another one has them."""
        needed = sum(path.stat().st_size for path in files.values()) + _SPARE
        if needed > free:
            raise InputError(
                f"device {self.device.serial}: {ROOT}: {needed / 1e6:.0f} MB are needed, "
                f"{free / 1e6:.0f} MB are free"
            )
        folders = {os.path.dirname(f"{_STORE}/{tree}/{name}") for name in files}
        self._script('mkdir -p "$@"', *sorted(folders))
        for name, path in files.items():
            other = self._stored.get(wanted[name])
            if other is None:
                self.device.push(path.resolve(), f"{_STORE}/{tree}/{name}")
            else:
                self._script(f'cd {_STORE} && cp -p "$1" "$2"', other, f"{tree}/{name}")

    def _check(
        self, there: Mapping[str, str], files: Mapping[str, Path], wanted: Mapping[str, str]
    ) -> None:
        """Check that files arrived as they were when they were hashed."""
        for name, digest in wanted.items():
            found = there.get(name, "none")
            if found != digest:
                self._stored.clear()
                raise InputError(
                    f"{files[name]}: changed on its way to device {self.device.serial}: "
                    f"SHA-256 {found[:12]} there, {digest[:12]} here; try again"
                )

    def run(self, command: Sequence[str], seconds: float) -> Completed:
        """Run a program in ``place`` until it ends; it never outlives this call.

        Args:
            command: The program and its arguments.
            seconds: The longest that it may take.

        Returns:
            Its exit code and standard error; its standard output is the file ``out``.

        Raises:
            TimeoutError: It took longer, and is gone.
            DeviceGone: The device went away; it ends the program itself.
        """
        self._renew(seconds)
        limit = str(int(seconds + _GRACE))
        line = ["sh", "-c", _START, "sh", self.place, _GROUP, _LEADER, limit, *command]
        alive, held = os.pipe()  # closed when this process dies, which ends the program
        try:
            return self.device.shell(line, seconds, stdin=alive)
        except TimeoutError:
            kill_programs(self.device, self.place)
            raise
        finally:
            os.close(alive)
            os.close(held)

    def write(self, name: str, text: str) -> None:
        """Write a file in ``place``."""
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "file"
            local.write_text(text, encoding="utf-8")
            self.device.push(local, f"{self.place}/{name}")

    def read(self, name: str) -> bytes | None:
        """A file in ``place``; None if there is none.

        Raises:
            InputError: It is larger than any result.
        """
        if not self.device.exists(f"{self.place}/{name}"):
            return None
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "file"
            self.device.pull(f"{self.place}/{name}", local)
            if (size := local.stat().st_size) > RECORD_BYTES:
                raise InputError(f"device {self.device.serial}: {name}: {size:,} bytes, too large")
            return local.read_bytes()

    def _look(self, tree: str, size: int) -> tuple[dict[str, str], int]:
        """Hashes of the files in a directory of the store, about ``size`` bytes; free bytes."""
        done = self._script(_LOOK, tree, seconds=20 + size / _HASHED)
        hashes, _, space = done.out.rpartition("Filesystem")
        pairs = (line.split("  ./", 1) for line in hashes.splitlines())
        return {name: digest for digest, name in pairs}, parse_space(space, self.device)

    def _script(self, text: str, *arguments: str, seconds: float = 20) -> Completed:
        """Run a script that must succeed."""
        done = self.device.script(text, *arguments, seconds=seconds)
        if done.code:
            reason = (done.err.strip().splitlines() or [f"exit code {done.code}"])[-1]
            raise InputError(f"device {self.device.serial}: {reason.rpartition('sh: ')[2]}")
        return done


def kill_programs(device: Device, directory: str) -> None:
    """End every program that works in a directory of the device, with its process group.

    Raises:
        InputError: One does not end.
    """
    until = time.monotonic() + _ENDED
    while pids := _programs(device, directory):
        if time.monotonic() > until:
            raise InputError(
                f"device {device.serial}: process {pids[0]} in {directory} does not end; restart it"
            )
        device.script('for pid; do kill -9 "-$pid"; kill -9 "$pid"; done 2>/dev/null', *pids)


def _programs(device: Device, directory: str) -> list[str]:
    """Their process ids."""
    said = device.script(_PROGRAMS, directory).out
    found = re.findall(r"/proc/(\d+)/cwd -> (.*?)(?: \(deleted\))?$", said, re.MULTILINE)
    return [pid for pid, place in found if f"{place}/".startswith(f"{directory}/")]


def _parse(text: str) -> Lease | None:
    """A lease; None for anything else, such as half of one."""
    try:
        return Lease.model_validate_json(text)
    except ValidationError:
        return None
