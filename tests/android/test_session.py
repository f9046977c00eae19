"""Jobs on devices when all goes well, and what must hold of a session then."""

from __future__ import annotations

import hashlib
import time
from os import chown
from pathlib import Path

import pytest

from caliport.android_harness.device import session as sessions
from caliport.android_harness.device.adb import Device
from caliport.android_harness.device.session import session
from caliport.android_harness.run import run_all, run_job
from caliport.core.directories import content_hash
from caliport.core.errors import InputError
from caliport.export.artifact import Artifact
from tests.android.daemon import Daemon
from tests.android.standins import ANSWER, JOB, runner


def test_three_devices_work_at_once(phones: list[Daemon], artifact: Path, tmp_path: Path) -> None:
    made = runner(tmp_path, 'sleep 1; cp "$(dirname "$0")/answer.json" "$2"')
    devices = [Device(daemon.address) for daemon in phones]
    started = time.monotonic()
    found = run_all(
        dict.fromkeys(devices, JOB), Artifact.read(artifact), dict.fromkeys(devices, made), 20
    )
    assert time.monotonic() - started < 8
    assert list(found) == devices
    for device, ran in found.items():
        assert not isinstance(ran, InputError), ran
        assert ran.result == ANSWER
        assert ran.device.serial == device.serial
        assert ran.runner_sha256 == content_hash(made.directory)
        assert 1 < ran.seconds < 8


def test_nothing_is_pushed_twice(
    phone: Daemon, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[str] = []
    push = Device.push

    def counted(self: Device, local: Path, remote: str) -> None:
        pushed.append(local.name)
        push(self, local, remote)

    monkeypatch.setattr(Device, "push", counted)
    made = runner(tmp_path)
    device = Device(phone.address)
    with session(device, keep=True) as held:
        run_job(held, JOB, Artifact.read(artifact), made, 20)
        run_job(held, JOB, Artifact.read(artifact), made, 20)
        # another tree with a file that is there, beside one that is not
        (artifact / "added.json").write_text("{}", encoding="utf-8")
        run_job(held, JOB, Artifact.read(artifact), made, 20)
    with session(device) as held:  # another day
        run_job(held, JOB, Artifact.read(artifact), made, 20)
    files = [name for name in pushed if name != "file"]
    assert sorted(files) == [
        "added.json",
        "answer.json",
        "genai_config.json",
        "model.onnx",
        "model.onnx.data",
        "run",
    ]


def test_words_are_never_interpreted(phone: Daemon) -> None:
    words = ["a b", "$(id)", "`id`", "'\"", "*", "", "~", "\\n", ";exit 3", "ä\t\n"]
    done = Device(phone.address).shell(["printf", "%s|", *words])
    assert (done.code, done.out, done.err) == (0, "".join(f"{word}|" for word in words), "")
    done = Device(phone.address).shell(["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (done.code, done.out, done.err) == (7, "out\n", "err\n")


def test_files_arrive_as_they_are(phone: Daemon, artifact: Path) -> None:
    files = {"model.onnx": artifact / "model.onnx"}
    with session(Device(phone.address)) as held:
        place = held.put(files)
        there = phone.path(f"{held.place}/{place}/model.onnx").resolve()
        digest = hashlib.sha256(phone.path(held.place).joinpath(place, "model.onnx").read_bytes())
        assert there.name == "model.onnx"
        # damaged on the device: it is noticed and brought again
        phone.path(held.place).joinpath(place, "model.onnx").write_bytes(b"other")
        assert held.put(files) == place
        again = phone.path(held.place).joinpath(place, "model.onnx").read_bytes()
    assert hashlib.sha256(again).digest() == digest.digest()


def test_a_lease_is_honoured_until_it_expires(
    phone: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(phone.address)
    with session(device) as first:
        with pytest.raises(InputError, match="in use by process"), session(device):
            pass
        monkeypatch.setattr(sessions, "_IDLE", -60.0)
        first.put({})  # as if long ago
        monkeypatch.undo()
        with session(device), pytest.raises(InputError, match="another session took it"):
            first.put({})


def test_another_computer_s_lease_is_honoured_until_it_expires(phone: Daemon) -> None:
    device = Device(phone.address)
    now = time.time()
    theirs = sessions.Lease(
        session="theirs",
        host="elsewhere",
        pid=1,
        created=now,
        start=now,
        heartbeat=now,
        expiry=now + 90,
    )
    place = phone.path(sessions.HOME)
    (place / "store").mkdir(parents=True)
    (place / "theirs").mkdir()
    chown(place, 2000, 2000)
    for path in place.rglob("*"):
        chown(path, 2000, 2000)
    (place / "lease").write_text(theirs.model_dump_json(), encoding="utf-8")
    with pytest.raises(InputError, match="in use by process 1 on elsewhere, for at most"):
        session(device).__enter__()
    expired = theirs.model_copy(update={"expiry": now - 1})
    (place / "lease").write_text(expired.model_dump_json(), encoding="utf-8")
    with session(device) as held:
        assert {path.name for path in place.iterdir()} == {"lease", "store", held.name}
