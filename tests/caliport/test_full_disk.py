"""A disk that fills up, in each stage: one line, nothing half made, and the next run is fine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from caliport.data.examples import Example, write_jsonl
from tests.commands import ENVIRONMENT, IN_NAMESPACE, can_mount
from tests.fuzz.seeds import RECIPE
from tests.validation import runs

METHODS = "methods: [linear, lc], lc: {steps: 2, batch_size: 2}"
# Each command writes to a disk of 16 kB, then of eight times as much, until it succeeds.
FILLER = """
import contextlib, io, json, os, subprocess, sys, tempfile
from pathlib import Path
import torch
torch.set_num_threads(1)
from caliport.cli.main import app, guarded
from caliport.core.directories import content_hash

def call(command):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = guarded(lambda: app(command, standalone_mode=False), "", False)
        except SystemExit as error:
            code = error.code or 0
    return code, [line for line in said.getvalue().splitlines() if line.startswith("caliport: ")]

def stages(place):
    # what stages made, and not their reports, which hold times
    made = [file.parent for file in place.rglob("manifest.json")]
    return {
        str(path.relative_to(place)): content_hash(path)
        for path in made
        if path == place or {"composed", "artifacts"} & set(path.parts)
    }

def mount(place, size, *more):
    options = ",".join([f"size={size}k", *more])
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], check=True)

disk = Path("disk")
for name, command, temporary in json.load(open("commands.json")):
    disk.mkdir()
    size = 16
    mount(disk, size)
    tempfile.tempdir = str(disk) if temporary else None
    out = disk / "out" if not temporary else Path("elsewhere")
    while True:
        code, said = call([part.replace("OUT", str(out)) for part in command])
        left = sorted(str(path) for path in disk.rglob("*"))
        print(json.dumps([name, size, code, said, left]), flush=True)
        if code != 2 or size > 5000:
            break
        size *= 8
        mount(disk, size, "remount")
    again = Path("again") / name
    again.parent.mkdir(exist_ok=True)
    tempfile.tempdir = None
    print(json.dumps([name, "again", *call([part.replace("OUT", str(again)) for part in command])]))
    if again.exists() and not temporary:
        made = [stages(again), stages(out)]
        print(json.dumps([name, "equal", made[0] == made[1] and len(made[0])]), flush=True)
    subprocess.run(["umount", "--lazy", disk], check=True)
    disk.rmdir()
"""


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs mount namespaces to make a small disk")
def test_a_full_disk_in_each_stage(one_layer: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Each command again where it ran out of room: it ends as if it never had."""
    base, adapters = one_layer
    write_jsonl(tmp_path / "data.jsonl", [Example("tennis", "park"), Example("Tom", "Anna")])
    runs.write_run(tmp_path / "run", *runs.run_of())
    export = ["export", "--base", str(base), "--adapter", str(adapters[0]), "--no-preflight"]
    export += ["--precision", "int4", "--context", "128", "--out", "OUT", "--runtime"]
    validate = ["validate", "again/onnx", "--base", str(base), "--adapter", str(adapters[0])]
    (tmp_path / "base").symlink_to(base)
    for name, adapter in zip(("first", "second"), adapters, strict=True):
        (tmp_path / name).symlink_to(adapter)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("methods: [linear]", METHODS))
    commands = {
        "onnx": [*export, "onnx"],
        "executorch": [*export, "executorch"],
        "audit": ["audit", *map(str, adapters), "--out", "OUT"],
        "baseline": ["baseline", "store", "run", "OUT/b.json"],
        "compare": ["compare", "run", "run", "--out", "OUT/c.html"],
        "validate": [*validate, "--no-latency", "--out", "OUT"],
        "run": ["run", "recipe.yaml", "--runs", "OUT"],
        "temporary": [*validate, "--no-latency", "--out", "OUT"],
    }
    asked = [[name, command, name == "temporary"] for name, command in commands.items()]
    (tmp_path / "commands.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [*IN_NAMESPACE, sys.executable, "-c", FILLER],
        cwd=tmp_path,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    tries = [line for line in lines if isinstance(line[1], int)]
    for name, size, code, said, left in tries:
        if code:
            assert code == 2, (name, said)
            assert len(said) == 1
            assert re.search("No space left on device|MB of disk, . MB are free", said[0])
        parts = ("disk", "disk/out")
        for path in left:
            assert path.startswith(parts[1]), (name, size, left)
            assert ".partial-" not in path
            assert not path.endswith((".new", "-lock"))
    failed = {line[0] for line in tries if line[2]}
    assert failed == commands.keys() - {"baseline"}
    ended = {line[0]: line[2] for line in lines if line[1] == "again"}
    assert ended == dict.fromkeys(commands, 0)
    equal = {line[0]: line[2] for line in lines if line[1] == "equal"}
    # Of the recipe two methods for one composition, and one artifact.
    assert equal == {"onnx": 1, "executorch": 1, "run": 3} | dict.fromkeys(
        ("audit", "baseline", "compare", "validate"), 0
    )
