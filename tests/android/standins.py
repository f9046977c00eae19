"""What stands in for a phone's own words, for a runner and for a job."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from caliport.android_harness.runners.job import Answer, Job, Prompt, Result
from caliport.android_harness.runners.kinds import JobRunner
from tests.android.daemon import Daemon

PHONE = {
    "ro.product.cpu.abi": "x86_64",
    "ro.build.version.release": "15",
    "ro.product.manufacturer": "Example",
    "ro.product.model": "Phone",
}
BATTERY = """Current Battery Service state:
  AC powered: false
  level: 85
  scale: 100
  temperature: 273
"""
THERMAL = "IsStatusOverride: false\nThermalEventListeners:\nThermal Status: 1\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd aes sha2 asimddp i8mm\nCPU part\t: 0xd4d\n"
ANSWER = Result(
    runner="stand-in 1",
    runtime_version="0",
    threads=1,
    cores=(0,),
    load_seconds=0.1,
    peak_bytes=3,
    loaded_bytes=2,
    idle_bytes=1,
    answers=(Answer(tokens=(4, 2)),),
)
# Reads the job far enough to find the artifact, as every runner must.
_RUNNER = """#!/bin/sh
directory=$(sed 's/.*"directory":"\\([^"]*\\)".*/\\1/' "$1")
[ -f "$directory/model.onnx" ] || { echo "$directory: no model" >&2; exit 2; }
"""
JOB = Job(
    runtime="onnx", directory="", threads=1, max_new_tokens=2, prompts=(Prompt(tokens=(1, 2)),)
)


def properties(daemon: Daemon, **changed: str) -> None:
    """Write what a phone says of itself; ``changed`` are its last words, such as ``abi``."""
    said = {name: changed.get(name.rpartition(".")[2], text) for name, text in PHONE.items()}
    lines = "".join(f"{name}={text}\n" for name, text in said.items())
    (daemon.facts / "properties").write_text(lines, encoding="utf-8")


def clients() -> list[psutil.Process]:
    """Every adb of this process's network."""
    ours = os.readlink("/proc/thread-self/ns/net")
    found = []
    for process in psutil.process_iter(["name"]):
        try:
            if process.name() == "adb" and os.readlink(f"/proc/{process.pid}/ns/net") == ours:
                found.append(process)
        except (OSError, psutil.Error):
            continue
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE]


def runner(tmp_path: Path, script: str = 'cp "$(dirname "$0")/answer.json" "$2"') -> JobRunner:
    """A runner in sh: checks the job, then does what ``script`` says; $2 is the result's file."""
    directory = tmp_path / "runner"
    directory.mkdir()
    (directory / "answer.json").write_text(ANSWER.model_dump_json(), encoding="utf-8")
    program = directory / "run"
    program.write_text(_RUNNER + script, encoding="utf-8")
    program.chmod(0o755)
    return JobRunner("onnx", directory, ("{runner}/run",))
