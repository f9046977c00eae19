"""Run a command within limits of time and memory, and say whether it ended as promised.

Commands run in children of a process that has imported the libraries and exported once; see
``tests.forking``. That makes most of them take a fraction of a second.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from tests.commands import ENVIRONMENT
from tests.forking import _LIBRARIES
from tests.fuzz.mutate import SECRET
from tests.fuzz.seeds import BOTH

MEMORY = 2_500_000_000
"""Most bytes in memory at any moment, the libraries' half a gigabyte included."""
CPU_SECONDS = 120  # a recipe without `export` lowers three decoders, which takes over a minute
WALL_SECONDS = 240  # as a busy machine gives a command its seconds slowly
_SPARE = 8 * 2**30  # of address space; a command that takes more is stopped
_LINE = 2100
_MORE = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TOKENIZERS_PARALLELISM": "false",  # a fork loses threads
}


@dataclass(frozen=True)
class Asked:
    """A bad input.

    Attributes:
        arguments: Of the command.
        what: What is wrong with its input.
        writes: Where it may write, relative to its directory.
        refused: Whether only a refusal is right.
        fails: Whether exit code 1, a gate that failed, is a right answer too.
        calls: A function ``MODULE:NAME`` that takes the directory, in place of a command.
    """

    arguments: Sequence[str]
    what: str
    writes: Sequence[str] = ("out",)
    refused: bool = False
    fails: bool = False


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: the signal), output, seconds, peak bytes."""

    code: int
    seconds: float
    peak: int
    out: str
    errors: str


class Server:
    """A process that forks a child for each command."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.judge"],
            cwd=Path(__file__).parents[2],
            env={**ENVIRONMENT, **_MORE},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, **asked: Any) -> Any:
        """Send a request and wait for its answer."""
        server = self._process
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    def run(self, arguments: Sequence[str], cwd: Path, spare: Path) -> Ended:
        """Run a command in a directory; ``spare`` is for its output and temporary files."""
        files = [spare / "stdout", spare / "stderr"]
        temporary = spare / "tmp"
        temporary.mkdir()
        environment = {**ENVIRONMENT, **_MORE, "TMPDIR": str(temporary)}
        environment["XDG_CACHE_HOME"] = str(spare / "cache")
        code, seconds, peak = self.ask(
            command=["caliport", *arguments],
            cwd=str(cwd),
            environment=environment,
            files=list(map(str, files)),
        )
        out, errors = (f.read_bytes()[: 10**7].decode("utf-8", "replace") for f in files)
        return Ended(code, seconds, peak, out, errors)


@cache
def server() -> Server:
    """One for all cases of this process; it ends with it, finding no more lines."""
    return Server()


def listing(root: Path) -> dict[str, tuple[int, ...]]:
    """What lies below a directory, without opening or following anything."""
    found = {}
    for place, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = os.path.join(place, name)
            facts = os.lstat(path)
            plain = stat.S_ISREG(facts.st_mode)
            state = (facts.st_mode, *(plain * (facts.st_size, facts.st_mtime_ns, facts.st_ino)))
            found[os.path.relpath(path, root)] = state
    return found


def verdict(
    asked: Asked, ended: Ended, before: Mapping[str, Any], after: Mapping[str, Any]
) -> str | None:
    """What is not as promised, or None.

    Args:
        asked: The bad input.
        ended: How the command ended.
        before: ``listing`` of the place before it ran.
        after: The same afterwards.
    """
    if ended.code < 0:
        name = signal.Signals(-ended.code).name
        return f"hangs, {ended.seconds:.0f} s" if name in _STOPPED else f"killed by {name}"
    if ended.peak > MEMORY:
        return f"{ended.peak / 1e9:.1f} GB"
    text = ended.out + ended.errors
    if "Traceback" in text or "panicked at" in text:
        return "traceback: " + last(ended.errors)
    if SECRET in text:
        return "told of another directory"
    control = re.search(
        r"[^\n\S ]|[\x00-\x09\x0b-\x1f\x7f-\x9f]|[\ud800-\udfff]|[\u202a-\u202e]", text
    )
    if control:
        return f"control character {control[0]!r}"
    changed = sorted(n for n in {*before, *after} if before.get(n) != after.get(n))
    if ended.code == 2:
        lines = [line for line in ended.errors.splitlines() if not _said(line)]
        if len(lines) != 1 or not lines[0].startswith("caliport: "):
            return f"{len(lines)} lines of error: {' | '.join(lines)[:300]}"
        if len(lines[0]) > _LINE:
            return f"a line of {len(lines[0])}"
        if "internal error" in lines[0]:
            return lines[0][:300]
        left = [name for name in changed if not _of_stage(name)]
        if lines[0].startswith("caliport: --push-to-hub "):  # the artifact stays
            left = [name for name in left if not _expected(name, asked.writes)]
        return f"left or changed {', '.join(left)[:200]}" if left else None
    if ended.code not in (0, *([1] if asked.fails else ())):
        return f"exit {ended.code}: {last(ended.errors)}"
    outside = [name for name in changed if not _expected(name, asked.writes)]
    if outside:
        return f"wrote {', '.join(outside)[:200]}"
    if max(map(len, text.splitlines()), default=0) > 10 * _LINE:
        return "a line of output beyond 20,000 characters"
    return "accepted" if asked.refused and ended.code == 0 else None


_PROGRESS = re.compile(r", \d+ s$")
"""Ends what a log is told every ten seconds."""
_STOPPED = ("SIGKILL", "SIGXCPU")


def _said(line: str) -> bool:
    """Whether a line is of the stages of a run before the one that ended, or of long work."""
    done = line.endswith((": done", ": up to date, skipped")) or line.startswith("artifact: ")
    return not line.strip() or done or bool(_PROGRESS.search(line))


def _of_stage(name: str) -> bool:
    """Whether a path is of a run's stage that was done before another one ended the run."""
    return name.startswith("work/runs") and ".partial" not in name


def last(text: str) -> str:
    """The last line, cut."""
    return ([line for line in text.splitlines() if line.strip()] or [""])[-1][:300]


def _expected(name: str, writes: Sequence[str]) -> bool:
    """Whether a path is one that may be written, below one, or a directory that leads to one."""
    inside = os.path.relpath(name, "work")
    return any(f"{inside}/".startswith(f"{w}/") or w.startswith(f"{inside}/") for w in writes)


def wrong_result(root: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """What is wrong with the files that an accepted input gave, or None; listings as above."""
    import torch
    from safetensors.torch import load_file

    from caliport.core.directories import MANIFEST, check_files
    from caliport.core.errors import InputError
    from caliport.core.untrusted import read_json

    for path in (root / name for name in after if before.get(name) != after[name]):
        try:
            if path.name == MANIFEST:
                check_files(path.parent)
            if path.suffix == ".json":
                read_json(path, 2**27)
        except InputError as error:
            return f"writes what it would not read: {error}"
        if path.suffix == ".safetensors":
            bad = [n for n, t in load_file(path).items() if not torch.isfinite(t).all()]
            if bad:
                return f"{path.name}: {bad[0]} is not finite"
    return None


def _serve() -> None:
    for name in _LIBRARIES.split():
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        if "warm" in asked:
            answer: Any = _warm(Path(asked["warm"]))
        else:
            child = os.fork()
            if child == 0:
                _run(**asked)
            answer = _end(child)
        print(json.dumps(answer), flush=True)


def _warm(seeds: Path) -> str:
    """Let this process do once what children would each do: imports, and the graphs' traces."""
    import torch
    from tqdm import tqdm

    from caliport.cli.main import app, guarded
    from caliport.recipe.read import read_recipe

    tqdm.monitor_interval = 0
    torch.set_num_threads(1)
    export = ["export", "--base", "base", "--runtime", "onnx", "--out", "art"]
    commands = [
        ["audit", "first", "second", "--out", "audit"],
        [*export, "--adapter", "first"],
        [*export, "--precision", "int4"],  # a bundle would start ONNX Runtime's thread
        ["calibrate", *BOTH, "--method", "linear", "--out", "out"],
    ]
    output, here = os.dup(1), os.getcwd()
    os.dup2(2, 1)  # which is nowhere
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        for name in ("base", "first", "second", "recipe.yaml", "data.jsonl"):
            os.symlink(seeds / name, name)
        read_recipe(Path("recipe.yaml"))
        for command in commands:
            guarded(lambda: app(command, standalone_mode=False), "", False)  # noqa: B023
        os.chdir(here)
    sys.stdout.flush()
    os.dup2(output, 1)
    tempfile.tempdir = None
    assert len(os.listdir("/proc/self/task")) == 1, "a thread that a fork would lose"
    return "warm"


def _end(child: int) -> tuple[int, float, int]:
    start = time.monotonic()
    while True:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - start > WALL_SECONDS:
            _kill(child)
        time.sleep(0.002)
    _kill(child)  # what it may have started
    return os.waitstatus_to_exitcode(status), time.monotonic() - start, used.ru_maxrss * 1024


def _kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def _run(command: list[str], cwd: str, environment: dict[str, str], files: list[str]) -> NoReturn:
    os.setsid()
    for number, file in enumerate([os.devnull, *files]):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    space = pages * resource.getpagesize() + _SPARE
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**9, 10**9))
    sys.argv, sys.path[0] = command, cwd  # as python -m has them
    code: object = 1
    try:
        _call(command)
    except SystemExit as error:
        code = error.code
    except BaseException:
        import traceback

        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


def _call(command: list[str]) -> None:
    from caliport.cli.main import guarded, main

    if not command[1].startswith("@"):
        main()
    from tests.fuzz import calls

    sys.exit(guarded(lambda: getattr(calls, command[1][1:])(*command[2:]), "", False))


if __name__ == "__main__":
    _serve()
