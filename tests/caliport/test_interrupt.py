"""Ctrl-C, SIGTERM and SIGHUP end a command with one line, and the same command goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from caliport.data.examples import Example, write_jsonl
from tests.commands import ENVIRONMENT


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_calibration_goes_on(
    how: signal.Signals, base_dir: Path, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "data.jsonl", [Example("tennis", "park"), Example("Tom", "Anna")])
    flags = [f for adapter in adapter_dirs for f in ("--adapter", str(adapter))]
    flags += ["--base", str(base_dir), "--method", "lc", "--data", "data.jsonl", "--out", "out/lc"]
    command = [sys.executable, "-m", "caliport", "calibrate", *flags, "--steps"]
    more = {"cwd": tmp_path, "env": {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}, "text": True}
    running = subprocess.Popen(
        [*command, "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/.lc.partial-*")):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    running.send_signal(how)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 128 + how
    said = "caliport: interrupted; run the same command again to resume"
    assert errors.splitlines()[-1] == said
    assert errors.count("caliport: ") == 1
    assert not (tmp_path / "out" / "lc").exists()
