"""Real adb daemons, and a real adb client that sees them.

One set for all tests of a process: ``tests/conftest.py`` takes these fixtures in, and no other file
may, because pytest would make a second set, in a network in which the first is not seen.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import pytest
from adbutils import adb_path

from caliport.android_harness.device import adb as client
from tests.android.daemon import Daemon, fetch, private_network, wait_for
from tests.android.standins import ARM, BATTERY, THERMAL, clients, properties
from tests.commands import ENVIRONMENT


@pytest.fixture(scope="session")
def adb_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An adb server in a network of this process's own; it is gone afterwards."""
    fetch()
    home = tmp_path_factory.mktemp("adb")
    patch = pytest.MonkeyPatch()
    for name, value in (
        ("HOME", str(home)),
        ("TMPDIR", str(home)),
        ("ANDROID_ADB_SERVER_PORT", "5047"),
    ):
        patch.setenv(name, value)
        patch.setitem(ENVIRONMENT, name, value)
    patch.delenv("ANDROID_SERIAL", raising=False)
    with private_network():
        server = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", adb_path(), "server", "nodaemon"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        yield
        server.kill()
        server.wait()
        assert not clients()
    patch.undo()


@pytest.fixture(scope="session")
def three(adb_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    """Three devices: a phone, a phone of another kind, and one with little space."""
    place = tmp_path_factory.mktemp("devices")
    daemons = [
        Daemon(place / "phone", 7001),
        Daemon(place / "arm", 7002, cpuinfo=ARM),
        Daemon(place / "small", 7003, size="8m"),
    ]
    for daemon in daemons:
        properties(daemon)
        (daemon.facts / "dumpsys-battery").write_text(BATTERY, encoding="utf-8")
        (daemon.facts / "dumpsys-thermalservice").write_text(THERMAL, encoding="utf-8")
    yield daemons
    for daemon in daemons:
        daemon.stop()


@pytest.fixture
def phones(three: list[Daemon]) -> Iterator[list[Daemon]]:
    """The three devices, connected; a test must leave nothing on them or on this machine."""
    attach(three)
    yield three
    check_clean(three)


@pytest.fixture
def phone(three: list[Daemon]) -> Iterator[Daemon]:
    """One device, the only one that adb sees; like ``phones``."""
    attach(three[:1])
    yield three[0]
    check_clean(three)


def attach(daemons: list[Daemon]) -> None:
    """Make adb see these, and no other."""
    wanted = {daemon.address for daemon in daemons}
    seen = {line.serial: line.state for line in client.listed()}
    for address, state in seen.items():
        if address not in wanted or state != "device":
            client.adb(["disconnect", address])
    for daemon in daemons:
        daemon.start()
        client.connect(daemon.address)


def check_clean(daemons: list[Daemon]) -> None:
    """Assert that no program and no file is left on devices, and no adb but its server here."""
    for daemon in daemons:
        wait_for(lambda d=daemon: len(d.processes()) == len(d.processes("adbd")))
        left = [str(path) for path in daemon.path("/data/local/tmp").rglob("*")]
        for path in daemon.path("/data/local/tmp").iterdir():  # not to fail the next test too
            shutil.rmtree(path, ignore_errors=True)
        assert left == []
    wait_for(lambda: len(clients()) == 1)
