"""What devices say of themselves, which is chosen, and what would run there."""

from __future__ import annotations

import struct
from pathlib import Path

import psutil
import pytest

from caliport.android_harness.device import adb
from caliport.android_harness.device.adb import Device
from caliport.android_harness.device.facts import check_abi, choose, facts, obstacles
from caliport.core.errors import InputError
from caliport.export.artifact import Artifact
from tests.android.daemon import Daemon
from tests.android.standins import properties
from tests.commands import caliport


def test_facts_are_what_the_device_says(phones: list[Daemon]) -> None:
    found = facts(Device(phones[1].address))
    assert (found.kind, found.model, found.android) == ("phone", "Example Phone", "15")
    assert (found.abi, found.features) == ("x86_64", ("dotprod", "i8mm"))
    assert (found.battery, found.celsius, found.thermal) == (0.85, 27.3, 1)
    assert 0 < found.free_memory <= found.memory
    assert found.cores == psutil.cpu_count()
    assert facts(Device(phones[2].address)).free_space == 8 << 20


def test_what_adb_writes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adb, "_MOST", 1 << 20)
    monkeypatch.setattr(adb, "_binary", lambda: "yes")
    with pytest.raises(InputError, match="adb x: over 1 MiB of output, expected less"):
        adb.adb(["x"])
    monkeypatch.setattr(adb, "_binary", lambda: "sh")
    done = adb.adb(["-c", r"printf 'a\r\nb\rc\377'; echo no >&2; exit 3"])
    assert done == adb.Completed(3, "a\nb\nc\ufffd", "no\n")
    for slow in ("sleep 9", "exec >&- 2>&-; sleep 9"):
        with pytest.raises(TimeoutError, match=r"over 0\.1 s"):
            adb.adb(["-c", slow], 0.1)


def test_a_device_that_is_not_android_says_less(phones: list[Daemon]) -> None:
    """No ``getprop``, no ``dumpsys``: what the kernel says is all."""
    for name in ("getprop", "dumpsys"):
        (phones[0].facts / "bin" / name).rename(phones[0].facts / name)
    try:
        found = facts(Device(phones[0].address))
    finally:
        for name in ("getprop", "dumpsys"):
            (phones[0].facts / name).rename(phones[0].facts / "bin" / name)
    assert (found.kind, found.android, found.battery, found.thermal) == ("linux", "", None, None)
    assert found.abi in ("x86_64", "arm64-v8a")


def test_a_device_is_chosen_by_what_it_is(phones: list[Daemon]) -> None:
    properties(phones[1], release="12")
    try:
        assert choose("phone,i8mm,memory>=0") == Device(phones[1].address)
        assert choose("x86_64,android>=13") == Device(phones[0].address)
        with pytest.raises(InputError, match=r"none of .* is usable and like that"):
            choose("i8mm,android>=13")
    finally:
        properties(phones[1])


def test_the_command_shows_devices_and_what_would_run(
    phones: list[Daemon], artifact: Path, tmp_path: Path
) -> None:
    with (artifact / "model.onnx").open("ab") as stream:
        stream.truncate(20 << 20)
    done = caliport("devices", artifact, "--connect", phones[0].address, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    fits, _, small = (line for line in done.stdout.splitlines() if line.startswith(str(artifact)))
    assert fits == f"{artifact} on {phones[0].address}: would run"
    assert "21 MB do not fit 8 MB of free space" in small
    assert "dotprod i8mm" in done.stdout
    assert "27.3" in done.stdout


def test_a_32_bit_device_is_told_apart(phone: Daemon, artifact: Path) -> None:
    properties(phone, abi="armeabi-v7a")
    try:
        found = facts(Device(phone.address))
    finally:
        properties(phone)
    assert obstacles(found, Artifact.read(artifact)) == [
        "ABI armeabi-v7a: runners are built for arm64-v8a and x86_64"
    ]
    program = artifact / "run"
    program.write_bytes(b"\x7fELF" + bytes(14) + struct.pack("<H", 183))
    with pytest.raises(InputError, match=r"built for arm64-v8a, but device .* is armeabi-v7a"):
        check_abi(found, [program])
