"""Emulators against a scripted SDK: no system image boots here, so its tools are stand-ins in sh.

Everything else is real: the commands, the processes, their groups and pipes, ports and signals.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from caliport.android_harness.emulator import emulator, sdk
from caliport.android_harness.emulator.emulator import Process, Running, create, native_abi, running
from caliport.android_harness.emulator.sdk import Image, Sdk
from caliport.core.errors import InputError
from tests.android.daemon import wait_for
from tests.commands import ENVIRONMENT, ROOT, caliport

ABI = native_abi()
IMAGE = Image("34", "default", ABI)
AVD = f"caliport-34-default-{ABI}"
WORKFLOW = yaml.safe_load((ROOT / "docs/examples/emulator.yml").read_text(encoding="utf-8"))
SCRIPTS = {s["name"]: s["run"] for s in WORKFLOW["jobs"]["emulator"]["steps"] if "run" in s}

_AVDMANAGER = """
read -r answer
echo "$answer $*" >> "$PLACE/avdmanager"
echo "Loading local repository..."
[ -e "$PLACE/broken" ] && { echo "Error: disk is full" >&2; exit 1; }
mkdir "$ANDROID_AVD_HOME/$5.avd"
echo "target=android-34" > "$ANDROID_AVD_HOME/$5.ini"
echo "image.sysdir.1=$(echo "$7" | tr ';' '/')/" > "$ANDROID_AVD_HOME/$5.avd/config.ini"
"""
# Installs nothing before licences were accepted.
_SDKMANAGER = """
[ -e "$PLACE/licences" ] || { [ ! -t 0 ] && read -r yes && [ "$yes" = y ]; } || exit 1
for package; do
  case $package in
  --*) ;;
  emulator) mkdir "$ANDROID_HOME/emulator"; touch "$ANDROID_HOME/emulator/emulator" ;;
  *) mkdir -p "$ANDROID_HOME/$(echo "$package" | tr ';' '/')" ;;
  esac
done
"""
# What "$PLACE/fate" says: dies, hangs, or else boots, in a while.
_EMULATOR = """
if [ "$1" = -accel-check ]; then
  [ -e "$PLACE/slow" ] || { printf 'accel:\\n0\\nKVM (version 12) is usable.\\naccel\\n'; exit 0; }
  printf 'accel:\\n8\\nKVM is held by another hypervisor.\\naccel\\n'; exit 8
fi
echo "$ANDROID_AVD_HOME $*" >> "$PLACE/started"
echo "INFO | booting"
[ "$(cat "$PLACE/fate")" = dies ] && { echo "FATAL | no room for user data"; exit 1; }
sleep 300 & # what it starts itself
echo $$ $! >> "$PLACE/pids"
trap 'exit 0' TERM
[ "$(cat "$PLACE/fate")" = hangs ] || { sleep 0.2; echo $$ > "$PLACE/emulator-$4"; }
wait
"""
_ADB = """
if [ "$1" = -s ]; then serial=$2; shift 2; fi
there() { read -r pid < "$PLACE/$1" && kill -0 "$pid"; } 2>/dev/null
case $1 in
version) echo "Android Debug Bridge version 1.0.41" ;;
devices) echo "List of devices attached" ;;
*) there "$serial" || { echo "error: device '$serial' not found" >&2; exit 1; }
  case $1 in
  emu) kill "$pid" ;;
  shell) getprop() { echo 1; }; eval "$2" ;;
  esac ;;
esac
"""
_SCRIPTS = {
    "cmdline-tools/latest/bin/avdmanager": _AVDMANAGER,
    "cmdline-tools/latest/bin/sdkmanager": _SDKMANAGER,
    "emulator/emulator": _EMULATOR,
    "platform-tools/adb": _ADB,
}


@pytest.fixture
def android(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A scripted SDK, and a cache of its own; nothing of an emulator may live on after a test."""
    place = tmp_path / "an SDK"
    for name, script in _SCRIPTS.items():
        program = place / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\nPLACE={shlex.quote(str(tmp_path))}\n{script}")
        program.chmod(0o755)
    (place / IMAGE.package.replace(";", "/")).mkdir(parents=True)
    (tmp_path / "fate").write_text("boots")
    (tmp_path / "pids").touch()
    path = f"{place / 'platform-tools'}:{os.environ['PATH']}"
    for name, value in (
        ("ANDROID_HOME", str(place)),
        ("XDG_CACHE_HOME", str(tmp_path / "cache")),
        ("PATH", path),
    ):
        monkeypatch.setenv(name, value)
        monkeypatch.setitem(ENVIRONMENT, name, value)
    for name in ("ANDROID_SDK_ROOT", "ANDROID_SERIAL", "ADBUTILS_ADB_PATH"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delitem(ENVIRONMENT, name, raising=False)
    yield tmp_path
    left = alive(tmp_path)
    for process in left:  # not to fail the next test too
        process.kill()
    assert left == []
    assert not [path for path in emulator.home().glob("*") if path.suffix not in ("", ".log")]


def alive(place: Path) -> list[psutil.Process]:
    """The emulators that were started and what they started, as far as they live."""
    found = []
    for pid in (place / "pids").read_text().split():
        try:
            process = psutil.Process(int(pid))
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def said(place: Path, *arguments: object, code: int = 2) -> str:
    """The last line that ``caliport emulator`` says beside its output."""
    done = caliport("emulator", *arguments, cwd=place)
    assert done.returncode == code, done.stderr
    return done.stderr.splitlines()[-1]


def test_an_emulator_runs_from_start_to_stop(android: Path) -> None:
    done = caliport("emulator", "create", cwd=android)
    assert done.stderr == f"AVD {AVD}: made, {IMAGE.package}\n"
    assert said(android, "create", code=0) == f"AVD {AVD}: up to date, {IMAGE.package}"
    arguments = f"no create avd --force --name {AVD} --package {IMAGE.package}\n"
    assert (android / "avdmanager").read_text() == arguments

    done = caliport("emulator", "start", "--port", 5580, "--ram", 2048, cwd=android)
    assert (done.returncode, done.stdout) == (0, "emulator-5580\n"), done.stderr
    (one,) = running()
    assert (one.serial, one.avd, one.ram, one.owner) == ("emulator-5580", AVD, 2048, None)
    assert len(alive(android)) == 2
    place, *flags = (android / "started").read_text().split()
    assert place == str(emulator.home() / "avd")
    assert shlex.join(flags) == (
        f"-avd {AVD} -port 5580 -memory 2048 -accel on -gpu swiftshader_indirect -no-window "
        "-no-audio -no-boot-anim -no-snapshot -wipe-data"
    )
    listed = caliport("emulator", "list", cwd=android).stdout.splitlines()[-2].split()
    assert listed == [AVD, IMAGE.package, "emulator-5580", "2048", "stopped"]
    assert f"AVD {AVD}: runs as emulator-5580" in said(android, "start")
    create("other", IMAGE)
    assert "port 5580: taken" in said(android, "start", "--name", "other", "--port", 5580)
    assert "emulator emulator-5556: not running; found emulator-5580" in said(
        android, "stop", "emulator-5556"
    )

    done = caliport("emulator", "stop", cwd=android)
    assert (done.returncode, done.stdout) == (0, "emulator-5580: stopped\n"), done.stderr
    assert running() == alive(android) == []
    assert one.log.read_text().splitlines()[-1] == "exit code 0", "it was not told to end"


def test_run_is_a_command_with_an_emulator_around_it(android: Path) -> None:
    with socket.socket() as other:  # where adb would be of the first free one
        first = next(port for port in emulator.PORTS if emulator._free(port))
        other.bind(("127.0.0.1", first + 1))
        other.listen()
        script = "echo $ANDROID_SERIAL; exit 7"
        done = caliport("emulator", "run", "--", "sh", "-c", script, cwd=android)
        create("other", IMAGE)
        text = said(android, "start", "--name", "other", "--port", first)
        assert text.startswith(f"caliport: port {first}: taken")
    assert done.returncode == 7, done.stderr
    serial = done.stdout.strip()
    assert re.fullmatch(r"emulator-55\d[02468]", serial)
    assert serial != f"emulator-{first}"
    assert running() == alive(android) == []
    assert "expected a command" in said(android, "run", "--", "no such command")


@pytest.mark.parametrize(
    ("fate", "says"),
    [
        ("dies", "ended before it had booted; it said: INFO | booting | FATAL | no room for user"),
        ("hangs", "not booted within 1 s; it said: INFO | booting ("),
    ],
)
def test_what_does_not_boot_is_one_line_and_gone(android: Path, fate: str, says: str) -> None:
    (android / "fate").write_text(fate)
    line = said(android, "run", "--timeout", 1, "--", "touch", "ran")
    assert re.match(r"caliport: emulator-55\d\d: ", line)
    assert says in line
    assert not (android / "ran").exists()
    assert running() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_emulator_ends_with_the_process_it_belongs_to(
    android: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "caliport", "emulator", "run", "--"]
    command += ["sh", "-c", "touch ran; exec cat"]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}  # cat ends with the test
    with subprocess.Popen(command, cwd=android, env=ENVIRONMENT, **pipes) as owner:
        wait_for((android / "ran").exists)
        (file,) = emulator.home().glob("*.json")
        assert len(alive(android)) == 2
        owner.send_signal(number)
        owner.wait(20)
        wait_for(lambda: not alive(android))
    assert file.exists() == (number == signal.SIGKILL), "or nothing is left for the next command"
    assert running() == []
    assert not file.exists()


def test_an_emulator_that_outlived_its_owner_is_stopped_by_the_next_command(android: Path) -> None:
    create(AVD, IMAGE)
    caliport("emulator", "start", cwd=android)
    (one,) = running()
    with subprocess.Popen(["true"]) as owner:
        dead = Process(pid=owner.pid, created=psutil.Process(owner.pid).create_time())
    one.file.write_text(one.model_copy(update={"owner": dead}).model_dump_json())
    listed = caliport("emulator", "list", cwd=android).stdout.splitlines()[-2].split()
    assert listed == [AVD, IMAGE.package, "-"]
    assert alive(android) == []


def test_another_process_with_a_number_is_not_taken_for_the_emulator(android: Path) -> None:
    emulator.home().mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        born = psutil.Process(other.pid).create_time()
        mine = Process(pid=other.pid, created=born)
        earlier = mine.model_copy(update={"created": born - 60})
        for port, owner, leader in (
            (5570, None, earlier),
            (5572, earlier, None),
            (5574, mine, None),
        ):
            one = Running(avd="x", port=port, ram=2048, owner=owner, leader=leader)
            one.file.write_text(one.model_dump_json())
        (emulator.home() / "emulator-5576.json").write_text('{"avd": "x", "po')
        assert running() == [one], "the last is a start that goes on"
        assert other.poll() is None
        other.kill()
        other.wait()
    assert running() == []


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b", "-x", ".x", "a b", "x;y", "$(x)", "ü"])
def test_names_that_paths_or_shells_would_take_apart_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"AVD .*expected letters, digits"):
        create(name, IMAGE)
    with pytest.raises(InputError, match=r"AVD .*expected letters, digits"), emulator.booted(name):
        pass
    for parts in ((name, "default", ABI), ("34", name, ABI), ("34", "default", name)):
        with pytest.raises(InputError, match=r"(api|tag|abi) .*expected letters, digits"):
            Image(*parts)


def test_what_is_missing_of_the_sdk_is_named_and_installed_on_request(
    android: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = Image("35", "google_apis", ABI)
    with pytest.raises(InputError, match=rf'; run: sdkmanager "{missing.package}"$'):
        create("new", missing)
    arguments = ("create", "--api", "35", "--tag", "google_apis", "--install")
    assert said(android, *arguments).endswith(f'run: sdkmanager "{missing.package}"')
    (android / "licences").touch()
    assert said(android, *arguments, code=0).endswith(f"made, {missing.package}")
    with pytest.raises(InputError, match=r"AVD new: not made yet, found caliport-35-google_apis"):
        emulator.booted("new").__enter__()

    monkeypatch.delenv("ANDROID_HOME")
    packages = f'sdkmanager "emulator" "platform-tools" "{IMAGE.package}"'
    with pytest.raises(InputError, match=rf"none by ANDROID_HOME.*PATH; .* then: {packages}$"):
        create("new", IMAGE)
    monkeypatch.setenv("PATH", f"{android}/an SDK/emulator:{os.environ['PATH']}")
    assert create("new", IMAGE)


def test_other_wrong_wishes_are_one_line(android: Path) -> None:
    other = {"x86_64": "arm64-v8a"}.get(ABI, "x86_64")
    with pytest.raises(InputError, match=f"ABI {other}: emulators have this machine's own, {ABI}"):
        create("new", Image("34", "default", other))
    create(AVD, IMAGE)
    for port in (5555, 5552):
        with pytest.raises(InputError, match="expected an even one from 5554 to 5584"):
            emulator.booted(AVD, port=port).__enter__()
    (android / "broken").touch()
    with pytest.raises(InputError, match="avdmanager: Error: disk is full; expected it to make"):
        create("new", IMAGE)


def test_without_acceleration_it_says_what_to_do_or_goes_on(
    android: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (android / "slow").touch()
    tools = Sdk(android / "an SDK", android)
    with monkeypatch.context() as patch:
        patch.setattr("platform.system", lambda: "Linux")
        patch.setattr(sdk, "_KVM", android / "kvm")
        with pytest.raises(InputError, match=r"no .*/kvm; turn virtualization on .*; --no-accel"):
            tools.check_acceleration()
        (android / "kvm").touch()
        with pytest.raises(InputError, match=r"KVM is held by another hypervisor\.; --no-accel"):
            tools.check_acceleration()
        patch.setattr("os.access", lambda path, mode: False)  # nothing is refused to root
        with pytest.raises(InputError, match=r"usermod -aG kvm \$USER.*; --no-accel goes on"):
            tools.check_acceleration()
    assert said(android, "run", "--", "touch", "ran").startswith("caliport: acceleration: ")
    assert not (android / "started").exists()
    said(android, "run", "--no-accel", "--", "touch", "ran", code=0)
    assert (android / "ran").exists()
    assert " -accel off " in (android / "started").read_text()


def test_the_workflow_installs_what_its_emulator_needs(android: Path) -> None:
    """Its own script, with a scripted ``sdkmanager``; then nothing is missing of what it runs."""
    root = android / "an SDK"
    for name in ("emulator", "platform-tools", "system-images"):
        shutil.rmtree(root / name)
    script = SCRIPTS["Install the emulator"]
    done = subprocess.run(["bash", "-e"], input=script, env=ENVIRONMENT, text=True, cwd=android)
    assert done.returncode == 0
    ran = SCRIPTS["Hold them against this machine on the emulator"]
    api, abi = (re.search(rf"--{name} (\S+)", ran) for name in ("api", "abi"))
    assert api is not None
    assert abi is not None
    assert Sdk(root, android).missing(Image(api[1], "default", abi[1])) == []


def test_the_workflow_is_sound() -> None:
    for script in SCRIPTS.values():
        assert "${{" not in script
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, "")
    used = [step["uses"] for step in WORKFLOW["jobs"]["emulator"]["steps"] if "uses" in step]
    assert used
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", name) for name in used)
    assert WORKFLOW["permissions"] == {"contents": "read"}
