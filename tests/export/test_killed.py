"""Killed without warning at any moment, an export leaves a whole artifact or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT

from caliport.calibrate.training.small_base import BaseShape, build_model, build_tokenizer
from tests.conftest import TEXTS

# Forks a child for every export, and kills it after a share of the time that one takes or stops it
# again and again. Reports a JSON line for each moment, with what lies there then.
FORKER = """
import json, os, random, signal, sys, time
from pathlib import Path

checked = set()

def survey(out, mark=lambda out, manifest: manifest["settings"]["context"]):
    '''What a user finds: none, or the mark of a whole artifact; and what lies beside it.'''
    from caliport.core.directories import check_files, key, read_manifest
    left = sorted(path.name.partition("-")[0] for path in out.parent.glob(".*"))
    if not out.exists():
        return None, left
    check_files(out)
    manifest = read_manifest(out)
    if manifest["key"] not in checked:  # which takes longer than all else
        assert manifest["key"] == key(manifest["stage"], manifest["inputs"], manifest["settings"])
        checked.add(manifest["key"])
    return mark(out, manifest), left

def fork(work):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return pid

def child(work, wait):
    '''Let ``work`` run in a process of its own for ``wait`` seconds, or until ``wait()``.'''
    start, pid = time.monotonic(), fork(work)
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return "ended", os.waitstatus_to_exitcode(status), time.monotonic() - start
        if wait() if callable(wait) else time.monotonic() - start >= wait:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "killed", None, time.monotonic() - start
        time.sleep(0.0005)

def frozen(work, look):
    '''Let ``work`` run in a process of its own and call ``look`` while all of it stands still.

    A kill would leave the very files that lie there then. Returns its exit code and how long it
    ran.
    '''
    pid, ran = fork(work), 0.0
    while True:
        start = time.monotonic()
        time.sleep(0.002)
        os.kill(pid, signal.SIGSTOP)
        _, status = os.waitpid(pid, os.WUNTRACED)
        ran += time.monotonic() - start
        if not os.WIFSTOPPED(status):
            return os.waitstatus_to_exitcode(status), ran
        look()
        os.kill(pid, signal.SIGCONT)

def report(**facts):
    print(json.dumps(facts), flush=True)
"""

# What is written takes about as long as a child takes to be forked, so moments spread over it all.
SMALL = """
def work(value):
    from caliport.core.outputs import new_directory
    with new_directory(out, "export", {}, {"context": value}) as (partial, extra):
        for index in range(6):
            (partial / str(index)).write_bytes(bytes([value % 256]) * 50_000)

out = Path(sys.argv[1]) / "art"
out.parent.mkdir()
import caliport.core.directories
_, code, whole = child(lambda: work(0), 60)
assert code == 0
draw = random.Random(0)
for count in range(1, 151):
    how, code, _ = child(lambda: work(count), draw.uniform(0, 1.2 * whole))
    found, left = survey(out)
    report(how=how, code=code, found=found, left=left)
_, code, _ = child(lambda: work(1000), 60)
report(how="last", code=code, found=survey(out)[0], left=survey(out)[1])
"""

REAL = """
import logging, warnings
from tqdm import tqdm
tqdm.monitor_interval = 0  # its thread would be missing in a child
import torch, torchao, transformers
torch.set_num_threads(1)

base = Path(sys.argv[2])
settings = json.loads((base / "generation_config.json").read_text())

def export(runtime, out):
    from caliport.cli.main import app, guarded
    flags = ["--base", str(base), "--runtime", runtime, "--context", "8"]
    command = ["export", *flags, "--out", str(out)]
    return guarded(lambda: app(command, standalone_mode=False), "", False)

def work(out, runtime, number):
    '''An export of a base that no export had before; its number is in the artifact.'''
    (base / "generation_config.json").write_text(json.dumps({**settings, "top_k": number}))
    return lambda: export(runtime, out)

def mark(out, manifest):
    return json.loads((out / "generation_config.json").read_text())["top_k"]

place = Path(sys.argv[1])
place.mkdir()
draw = random.Random(0)
for runtime, kills in (("onnx", 5), ("executorch", 3)):
    assert export(runtime, place / "warm") == 0  # children import, trace and lower nothing
    out = place / runtime / "art"
    for number in (1, 2):  # where nothing is, and in place of another
        def look():
            found, left = survey(out, mark)
            report(how="frozen", code=0, found=found, left=left, asked=number)
        code, whole = frozen(work(out, runtime, number), look)
        assert code == 0 and survey(out, mark) == (number, [])
    _, code, whole = child(work(out, runtime, 3), 600)
    assert code == 0
    shares = [(index + draw.random()) / kills for index in range(kills)]
    draw.shuffle(shares)
    patterns = [".art.partial-*", ".art.partial-*/*", ".art.partial-*/manifest.json"]
    count = 10
    for when in [*shares, *patterns]:
        for _ in range(4):  # again where it ended before it was killed, being faster than the last
            count += 1
            wait = (lambda: any(out.parent.glob(when))) if isinstance(when, str) else whole * when
            how, code, seconds = child(work(out, runtime, count), wait)
            found, left = survey(out, mark)
            report(how=how, code=code, found=found, left=left, seconds=seconds)
            if how == "killed":
                break
            whole = min(whole, seconds)
    _, code, _ = child(work(out, runtime, 1000), 600)
    report(how="last", code=code, found=survey(out, mark)[0], left=survey(out)[1])
"""


def run(script: str, *arguments: object, timeout: float) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-c", FORKER + script, *map(str, arguments)],
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(found: list[dict]) -> None:
    """Nothing failed of itself, left-overs never add up, and the last run left nothing of them."""
    assert [one for one in found if one["how"] != "killed" and one["code"] != 0] == []
    for one in found:
        assert set(one["left"]) <= {".art.partial", ".art.old", ".art.caliport"}, one
        assert len(one["left"]) <= 3, one
    assert found[-1]["how"] == "last"
    assert found[-1]["found"] is not None
    assert found[-1]["left"] == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_directory_is_whole_or_absent_whenever_it_is_killed(tmp_path: Path) -> None:
    """150 writers of small files, so that many a kill falls on the manifest and the renames."""
    found = run(SMALL, tmp_path / "place", timeout=300)
    check(found)
    assert found[-1]["found"] == 1000
    killed = [one for one in found if one["how"] == "killed"]
    assert len(killed) > 50
    assert any(one["left"] for one in killed)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_export_killed_at_any_moment_leaves_a_whole_artifact_or_none(tmp_path: Path) -> None:
    """`caliport export` of a model of one layer, killed 14 times: 8 to ONNX, 6 to ExecuTorch.

    Starting Python, importing the libraries and lowering take nearly all the time of an export and
    write nothing. So one process does that once, and forks a child for each of the exports, which
    go through the command line's own code with what was lowered. What a kill would leave is seen at
    hundreds of moments of two exports that are stopped at each of them, and go on. The kills show
    that the next export copes with what is left: they are spread evenly over the time that a whole
    export takes, in random order, and three more fall on the moments at which the partial
    directory, its first file and its manifest appear. Each child exports a base with other settings
    than those before, so none is skipped and all of them replace an artifact that is there.
    """
    shape = BaseShape(
        vocab_size=300, hidden_size=32, intermediate_size=32, layers=1, heads=2, context=32
    )
    tokenizer = build_tokenizer(TEXTS, shape.vocab_size)
    build_model(tokenizer, shape, seed=0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    found = run(REAL, tmp_path / "place", tmp_path / "base", timeout=900)
    ends = [index for index, one in enumerate(found) if one["how"] == "last"]
    assert len(ends) == 2
    check(found[: ends[0] + 1])
    check(found[ends[0] + 1 :])
    assert [found[index]["found"] for index in ends] == [1000, 1000]
    killed = [one for one in found if one["how"] == "killed"]
    assert len(killed) >= 12, [one["how"] for one in found]
    assert any(one["left"] for one in killed)
    for seen in (found[: ends[0]], found[ends[0] :]):
        moments = [one for one in seen if one["how"] == "frozen"]
        assert {one["found"] for one in moments if one["asked"] == 1} <= {None, 1}
        assert {one["found"] for one in moments if one["asked"] == 2} <= {None, 1, 2}
        assert len(moments) >= 100
        assert len([one for one in moments if one["left"]]) >= 50
