"""Ctrl-C, SIGTERM and SIGHUP end a command with one line, and the same command goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from caliport.data.examples import Example, write_jsonl
from tests.forking import forked
from tests.sampling import thorough


@pytest.mark.parametrize("how", [signal.SIGINT, *map(thorough, (signal.SIGTERM, signal.SIGHUP))])
def test_an_interrupted_calibration_goes_on(
    how: signal.Signals, base_dir: Path, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "data.jsonl", [Example("tennis", "park"), Example("Tom", "Anna")])
    flags = [f for adapter in adapter_dirs for f in ("--adapter", str(adapter))]
    flags += ["--base", str(base_dir), "--method", "lc", "--data", "data.jsonl", "--out", "out/lc"]
    done = forked(
        *("calibrate", *flags, "--steps", "100000"),
        cwd=tmp_path,
        interrupt=("out/.lc.partial-*", how),
    )
    assert done.returncode == 128 + how
    said = "caliport: interrupted; run the same command again to resume"
    assert done.stderr.splitlines()[-1] == said
    assert done.stderr.count("caliport: ") == 1
    assert not (tmp_path / "out" / "lc").exists()
