"""Commands in processes forked from one that has imported the libraries.

Starting Python and importing torch, transformers and the rest takes many times as long as a
command on a tiny model. ``tests.commands.caliport`` starts one anew all the same, as a user does;
it is for tests of the process itself, and ``forked`` for all others. Each is a process of its own,
with its own directory, environment and output, and goes through ``caliport.cli.main.main``.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NoReturn

from tests.commands import ENVIRONMENT

# What commands import, but for ONNX Runtime, which starts a thread that a fork would lose.
_LIBRARIES = """
    torch torch._dynamo torch.onnx numpy numba scipy.stats matplotlib.figure jinja2 pydantic rich
    transformers transformers.models.llama.modeling_llama peft accelerate huggingface_hub
    onnx onnx_ir onnxscript torchao.quantization executorch.exir
    executorch.backends.xnnpack.partition.xnnpack_partitioner
    executorch.extension.pybindings.portable_lib executorch.extension.llm.custom_ops.custom_ops
"""


@cache
def _server() -> subprocess.Popen[str]:
    """One for all tests of this process; it ends with it, finding no more lines."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.forking"],
        cwd=Path(__file__).parents[1],
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def forked(
    *arguments: object,
    cwd: Path,
    kill_after: float | None = None,
    interrupt: tuple[str, int] | None = None,
    env: Mapping[str, str] = ENVIRONMENT,
    code: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """``caliport`` in a process of its own, from a directory, its output kept.

    Args:
        arguments: Of the command.
        cwd: The directory.
        kill_after: Seconds after which it is killed without warning.
        interrupt: A pattern and a signal, sent half a second after a path of the pattern appears.
        env: Its environment.
        code: A program in Python to run in place of ``caliport``.
    """
    command = ["caliport" if code is None else "-c", *map(str, arguments)]
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place, "out"), Path(place, "errors")]
        asked = [command, str(cwd), dict(env), list(map(str, files)), code]
        asked += [kill_after, interrupt]
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        ended = int(server.stdout.readline())
        return subprocess.CompletedProcess(command, ended, *(file.read_text() for file in files))


_PROGRAM = """#!{python} -SE
import json, os, socket, sys
asked = socket.socket(socket.AF_UNIX)
asked.connect({address!r})
asked.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode() + b"\\n")
code, out, errors = json.load(asked.makefile())
sys.stdout.write(out)
sys.stderr.write(errors)
sys.exit(code)
"""


class _Answer(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        arguments, cwd, env = json.loads(self.rfile.readline())
        done = forked(*arguments, cwd=Path(cwd), env=env)
        answer = [done.returncode, done.stdout, done.stderr]
        self.wfile.write(json.dumps(answer).encode() + b"\n")


@contextmanager
def program(place: Path) -> Iterator[Path]:
    """A program for shells that is ``forked``: ``place/caliport``, while the body runs."""
    with socketserver.UnixStreamServer(str(place / "socket"), _Answer) as server:
        path = place / "caliport"
        path.write_text(_PROGRAM.format(python=sys.executable, address=str(place / "socket")))
        path.chmod(0o755)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield path
        server.shutdown()


def _serve() -> None:
    for name in _LIBRARIES.split():
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread that a fork would lose"
    for line in sys.stdin:
        *asked, kill_after, interrupt = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(*asked)
        if interrupt is not None and _appears(Path(asked[1]), interrupt[0], child):
            time.sleep(0.5)
            os.kill(child, interrupt[1])
        print(_end(child, kill_after), flush=True)


def _appears(place: Path, pattern: str, child: int) -> bool:
    """Wait for a path, but no longer than the process lives."""
    while not any(place.glob(pattern)):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.02)
    return True


def _end(child: int, kill_after: float | None) -> int:
    """Wait for a process, and kill it where it must not live for longer; its exit code."""
    end = None if kill_after is None else time.monotonic() + kill_after
    while True:
        ended, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            end = None
        time.sleep(0.001)


def _run(
    argv: list[str], cwd: str, environment: dict[str, str], files: list[str], program: str | None
) -> NoReturn:
    for number, file in enumerate([os.devnull, *files]):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = argv, cwd  # as python -m has them
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has none
    from caliport.cli.main import main

    code: object = 1
    try:
        if program is None:
            main()
        else:
            exec(program, {"__name__": "__main__"})
            code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    _serve()
