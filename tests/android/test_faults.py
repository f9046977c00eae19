"""What goes wrong with devices: each ends in one line and code 2, and leaves nothing anywhere.

That nothing is left is asserted by the fixture ``phones`` after each test.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from caliport.android_harness import run as running
from caliport.android_harness.device import adb as client
from caliport.android_harness.device import session as sessions
from caliport.android_harness.device.adb import Device
from caliport.android_harness.device.facts import choose
from caliport.android_harness.device.session import session
from caliport.android_harness.run import run_job
from caliport.android_harness.runners.kinds import JobRunner
from caliport.cli.main import guarded
from caliport.export.artifact import Artifact
from tests.android.daemon import Daemon, wait_for
from tests.android.standins import ANSWER, JOB, properties, runner
from tests.commands import ENVIRONMENT, ROOT, caliport

HOME = "/data/local/tmp/caliport"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[Callable[[], object]], str]:
    """Calls something that must fail as a command does, and gives the line that it says."""

    def run(call: Callable[[], object]) -> str:
        code = guarded(call, "caliport --help", debug=False)
        (line,) = capsys.readouterr().err.splitlines()
        assert code == 2, line
        return line.removeprefix("caliport: ")

    return run


def job_on(daemon: Daemon, artifact: Path, made: JobRunner, seconds: float = 20) -> Callable:
    def call() -> None:
        with session(Device(daemon.address)) as held:
            run_job(held, JOB, Artifact.read(artifact), made, seconds)

    return call


Said = Callable[[Callable[[], object]], str]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo nonsense > $2", "result.json: Invalid JSON"),
        ('head -c 100 "$(dirname "$0")/answer.json" > $2', "result.json: Invalid JSON: EOF"),
        ("echo '{\"version\": 1}' > $2", "result.json: runner: Field required"),
        ('sed \'s/"answers":.*"turns"/"turns"/\' $(dirname $0)/answer.json > $2', "0 answers"),
        ("true", "ended well but wrote no result.json"),
        ("kill -9 $$", "killed (out of memory, or by somebody)"),
        ("echo the model is odd >&2; exit 2", "exit code 2: the model is odd"),
    ],
    ids=["garbage", "half", "fields", "answers", "no result", "killed", "refused"],
)
def test_runners_that_fail(
    phone: Daemon, artifact: Path, tmp_path: Path, said: Said, script: str, expected: str
) -> None:
    line = said(job_on(phone, artifact, runner(tmp_path, script)))
    assert line.startswith(f"device {phone.address}: runner: ")
    assert expected in line


def test_a_hanging_runner_is_stopped_with_all_it_started(
    phone: Daemon, artifact: Path, tmp_path: Path, said: Said
) -> None:
    hangs = "sleep 600 & (cd / && sleep 600) & setsid sleep 600 & echo $$ > $2; sleep 600"
    line = said(job_on(phone, artifact, runner(tmp_path, hangs), seconds=1))
    assert line == f"device {phone.address}: runner: no end after 1 s; it was stopped"


def test_what_a_runner_leaves_running_ends_with_the_session(
    phone: Daemon, artifact: Path, tmp_path: Path
) -> None:
    leaves = 'setsid sleep 600 & sleep 600 & cp "$(dirname "$0")/answer.json" "$2"'
    with session(Device(phone.address)) as held:
        assert (
            run_job(held, JOB, Artifact.read(artifact), runner(tmp_path, leaves), 20).result
            == ANSWER
        )
        wait_for(lambda: len(phone.processes("sleep")) == 1)


def test_a_runner_that_cannot_start(
    phone: Daemon, artifact: Path, tmp_path: Path, said: Said
) -> None:
    made = runner(tmp_path)
    assert made.directory is not None
    (made.directory / "run").chmod(0o644)
    assert "runner: cannot be executed: " in said(job_on(phone, artifact, made))
    (made.directory / "run").unlink()
    assert "runner: no such program on the device: " in said(job_on(phone, artifact, made))
    gone = JobRunner("onnx", None, ("/nowhere/python",))
    assert "/nowhere/python: no such program on the device" in said(job_on(phone, artifact, gone))


def test_a_runner_of_another_kind(
    phone: Daemon, artifact: Path, tmp_path: Path, said: Said
) -> None:
    made = runner(tmp_path)
    assert made.directory is not None
    (made.directory / "run").write_bytes(Path("/bin/true").read_bytes())
    properties(phone, abi="arm64-v8a")
    try:
        line = said(job_on(phone, artifact, made))
    finally:
        properties(phone)
    assert f"run: built for x86_64, but device {phone.address} is arm64-v8a" in line
    other = JobRunner("executorch", made.directory, made.command)
    assert "found a runner for executorch" in said(job_on(phone, artifact, other))


def test_no_space(phones: list[Daemon], artifact: Path, tmp_path: Path, said: Said) -> None:
    small = phones[2]
    with (artifact / "model.onnx").open("ab") as stream:
        stream.truncate(6 << 20)
    line = said(job_on(small, artifact, runner(tmp_path)))
    assert "/data/local/tmp: 11 MB are needed, 8 MB are free" in line


def test_no_space_in_the_midst(
    phones: list[Daemon],
    artifact: Path,
    tmp_path: Path,
    said: Said,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody else takes the space that was there."""
    monkeypatch.setattr(sessions, "parse_space", lambda text, device: 1 << 30)
    monkeypatch.setattr(running, "obstacles", lambda found, artifact: [])
    with (artifact / "model.onnx").open("ab") as stream:
        stream.truncate(20 << 20)
    assert "No space left on device" in said(job_on(phones[2], artifact, runner(tmp_path)))


def test_a_directory_that_cannot_be_written(phone: Daemon, said: Said) -> None:
    phone.mount("ro")
    try:
        line = said(lambda: session(Device(phone.address)).__enter__())
    finally:
        phone.mount("rw")
    assert line == (
        f"device {phone.address}: {HOME}: Read-only file system; expected to be able to write there"
    )


def test_an_artifact_that_changes_on_its_way(
    phone: Daemon, artifact: Path, tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = Device.push

    def meddled(self: Device, local: Path, remote: str) -> None:
        if local.name == "model.onnx":
            local.write_bytes(b"other")
        push(self, local, remote)

    monkeypatch.setattr(Device, "push", meddled)
    line = said(job_on(phone, artifact, runner(tmp_path)))
    assert "model.onnx: changed on its way to device" in line


def test_the_device_goes_in_mid_push_and_the_next_session_goes_on(
    phone: Daemon, artifact: Path, tmp_path: Path, said: Said
) -> None:
    (artifact / "sub folder" / "model.onnx.data").write_bytes(os.urandom(64 << 20))
    made = runner(tmp_path)
    store = phone.path(f"{HOME}/store")

    def arriving() -> bool:
        return any(path.stat().st_size > 1 << 20 for path in store.glob("*.part/*/*.data"))

    with meanwhile(lambda: wait_for(arriving), lambda: phone.signal(signal.SIGKILL)):
        line = said(job_on(phone, artifact, made))
    assert line.startswith(f"device {phone.address}: ")
    assert line.endswith("; reconnect it")
    reconnect(phone)
    (whole,) = store.glob("*.part/model.onnx")
    before = whole.stat().st_ino
    with session(Device(phone.address)) as held:
        assert run_job(held, JOB, Artifact.read(artifact), made, 20).result == ANSWER
        (whole,) = store.glob("*/model.onnx")
        assert whole.stat().st_ino == before


def test_the_device_goes_in_mid_run(
    phone: Daemon, artifact: Path, tmp_path: Path, said: Said
) -> None:
    made = runner(tmp_path, "sleep 600")
    with meanwhile(
        lambda: wait_for(lambda: phone.processes("sleep")), lambda: phone.signal(signal.SIGKILL)
    ):
        line = said(job_on(phone, artifact, made))
    assert line.startswith(f"device {phone.address}: ")
    wait_for(lambda: not phone.processes())  # the program ended, although nobody could be asked to
    reconnect(phone)
    with session(Device(phone.address)):
        pass


def test_the_device_goes_between_two_commands(phone: Daemon, said: Said) -> None:
    device = Device(phone.address)
    with session(device) as held:
        phone.signal(signal.SIGKILL)
        line = said(lambda: held.put({}))
        assert line.startswith(f"device {phone.address}: ")
        assert line.endswith("; reconnect it")
        reconnect(phone)
        held.put({})  # it is back, and still ours


def test_a_device_that_does_not_answer(
    phone: Daemon, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    phone.signal(signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            Device(phone.address).shell(["true"], 0.5)
        line = said(lambda: Device(phone.address).script("true", seconds=0.5))
    finally:
        phone.signal(signal.SIGCONT)
    assert line == f"device {phone.address}: no answer within 0.5 s"


def test_a_device_is_not_chosen(phones: list[Daemon], said: Said, tmp_path: Path) -> None:
    addresses = [daemon.address for daemon in phones]
    line = said(choose)
    assert line.startswith("adb sees 3 devices (")
    assert all(address in line for address in addresses)
    assert said(lambda: choose("R58M")).startswith("device R58M: not connected; adb sees 127.")
    client.adb(["disconnect"])
    assert said(choose) == client.NO_DEVICE
    done = caliport("devices", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"caliport: {client.NO_DEVICE}\n")
    for daemon in phones:
        client.connect(daemon.address)


def test_a_device_that_does_not_trust_this_computer(phone: Daemon, said: Said) -> None:
    with untrusting() as address:
        client.adb(["connect", address])
        wait_for(lambda: any(d.state == "unauthorized" for d in client.listed()))
        line = said(lambda: choose(address))
        client.adb(["disconnect", address])
    assert line == (
        f"device {address}: found 'unauthorized', expected 'device'; "
        "accept this computer's key on its screen"
    )


def test_nobody_at_an_address(phone: Daemon, said: Said) -> None:
    assert said(lambda: client.connect("127.0.0.1:7009")).startswith("127.0.0.1:7009: failed")


def test_the_port_of_the_adb_server_is_taken(
    phone: Daemon, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:  # which accepts, and says nothing
        port = other.getsockname()[1]
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
        monkeypatch.setattr(client, "_SECONDS", 1.0)
        line = said(choose)
    assert line.startswith(f"adb server on port {port}: ")
    assert line.endswith("name a free one by ANDROID_ADB_SERVER_PORT")


_HOST = """
import sys
from pathlib import Path
from caliport.android_harness.device.adb import Device
from caliport.android_harness.run import run_job
from caliport.android_harness.runners.kinds import JobRunner
from caliport.android_harness.device.session import session
from caliport.export.artifact import Artifact
from tests.android.standins import JOB
with session(Device(sys.argv[1])) as held:
    made = JobRunner("onnx", Path(sys.argv[3]), ("{runner}/run",))
    run_job(held, JOB, Artifact.read(sys.argv[2]), made, 600)
"""


def test_the_host_is_killed_in_mid_session(phone: Daemon, artifact: Path, tmp_path: Path) -> None:
    """Its program ends at once, its adb too; its files are gone after the next session."""
    made = runner(tmp_path, "sleep 600")
    arguments = [phone.address, str(artifact), str(made.directory)]
    host = subprocess.Popen([sys.executable, "-c", _HOST, *arguments], cwd=ROOT, env=ENVIRONMENT)
    try:
        wait_for(lambda: phone.processes("sleep"), 60)
    finally:
        host.kill()
        host.wait()
    wait_for(lambda: not phone.processes("sleep"))
    assert phone.path(f"{HOME}/lease").exists()
    with session(Device(phone.address)):
        assert len(list(phone.path(HOME).iterdir())) == 3  # lease, store, and the session's own


@contextmanager
def meanwhile(until: Callable[[], object], act: Callable[[], object]) -> Iterator[None]:
    """Do something at some moment of the body."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            until()
            act()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()
    assert not errors, errors


def reconnect(daemon: Daemon) -> None:
    daemon.start()
    client.adb(["disconnect", daemon.address])
    client.connect(daemon.address)


@contextmanager
def untrusting() -> Iterator[str]:
    """Speaks adb's protocol as far as to refuse every key; its address."""

    def message(command: bytes, first: int, data: bytes) -> bytes:
        number = int.from_bytes(command, "little")
        head = (number, first, 0, len(data), sum(data), number ^ 0xFFFFFFFF)
        return struct.pack("<6I", *head) + data

    def serve() -> None:
        while True:
            try:
                link, _ = server.accept()
            except OSError:
                return
            with link, link.makefile("rb") as stream:
                while head := stream.read(24):
                    command, kind, _, size, _, _ = struct.unpack("<6I", head)
                    stream.read(size)
                    # To CNXN and to a signature; a key (AUTH 3) waits for the user.
                    if command == 0x4E584E43 or kind == 2:
                        link.sendall(message(b"AUTH", 1, bytes(20)))

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)
