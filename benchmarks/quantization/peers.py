"""Other tools: the packages that each needs in its own environment, and its command."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.export.environments import create
from benchmarks.export.exporters import EXPORTERS, TORCH, Job
from benchmarks.quantization.llama import WORKER
from benchmarks.quantization.rows import CONTEXT, Row
from caliport.core.checkpoints import load_tokenizer, render_prompt
from caliport.core.errors import InputError

_BUILDER = ("onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "onnx==1.23.2", "onnx-ir==1.1.0")
_CHATS = "chats.jsonl"
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Request:
    """One artifact to make.

    Attributes:
        row: What is asked for.
        base: The model as given: a directory or a ``.gguf`` file.
        checkpoint: The model as a directory.
        text: Calibration text, JSON Lines.
        tokens: Of it to run.
        artifact: The directory to write.
        work: A directory for intermediate files.
        python: The tool's interpreter.
    """

    row: Row
    base: Path
    checkpoint: Path
    text: Path
    tokens: int
    artifact: Path
    work: Path
    python: str

    @property
    def job(self) -> Job:
        """The same for the export benchmark's tools."""
        return Job(self.checkpoint, self.artifact, self.work, CONTEXT, self.python)


@dataclass(frozen=True)
class Tool:
    """A tool that makes artifacts.

    Attributes:
        command: The command to measure.
        installs: Arguments of each ``pip install``, in order; empty for caliport's environment.
        prepare: Preparation that is not measured.
        cmake: Options with which pip builds its C++.
    """

    command: Callable[[Request], list[str]]
    installs: tuple[tuple[str, ...], ...] = ()
    prepare: Callable[[Request], object] = lambda _: None
    cmake: str = ""


def _caliport(request: Request) -> list[str]:
    text = ("--calibration", str(request.text), "--calibration-tokens", str(request.tokens))
    return [
        *(request.python, "-P", "-m", "caliport", "export", "--base", str(request.base)),
        *("--runtime", request.row.runtime, "--context", str(CONTEXT)),
        *("--out", str(request.artifact), *request.row.options),
        *(text if request.row.text else ()),
    ]


def _builder(request: Request) -> list[str]:
    options = request.row.options
    return [
        *(request.python, "-P", "-m", "onnxruntime_genai.models.builder"),
        *("-i", str(request.checkpoint), "-o", str(request.artifact), "-p", "int4", "-e", "cpu"),
        *("-c", str(request.work / "cache")),
        *(("--extra_options", *options) if options else ()),
    ]


def _script(name: str) -> Callable[[Request], list[str]]:
    """A script of this package in the tool's interpreter."""

    def command(request: Request) -> list[str]:
        text = request.work / _CHATS
        paths = (request.checkpoint, text, request.work, request.artifact)
        return [request.python, "-P", str(_HERE / name), *map(str, paths), str(request.tokens)]

    return command


def _chats(request: Request) -> None:
    """Write the calibration text as whole conversations, in the model's template."""
    tokenizer = load_tokenizer(request.checkpoint)
    rows = [json.loads(line) for line in request.text.read_text(encoding="utf-8").splitlines()]
    chats = [
        {"text": f"{render_prompt(tokenizer, row['input'])}{row['output']}{tokenizer.eos_token}"}
        for row in rows
    ]
    lines = [json.dumps(chat, ensure_ascii=False) for chat in chats]
    (request.work / _CHATS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _llama(request: Request) -> list[str]:
    source, out = str(request.base), str(request.artifact / "model.gguf")
    return [request.python, "-P", str(WORKER), "quantize", source, out, *request.row.options]


def _gguf_only(request: Request) -> None:
    if request.base.suffix != ".gguf":
        raise InputError(f"{request.base}: llama.cpp needs the .gguf file as --base")
    request.artifact.mkdir(parents=True)


def _exporter(name: str) -> Tool:
    known = EXPORTERS[name]
    return Tool(
        command=lambda request: known.command(request.job),
        installs=known.installs,
        prepare=lambda request: known.prepare(request.job),
    )


TOOLS = {
    "caliport": Tool(_caliport),
    "builder": Tool(_builder),
    "optimum-executorch": _exporter("optimum-executorch"),
    "export-llm": _exporter("export-llm"),
    "auto-round": Tool(
        _script("auto_round_worker.py"),
        ((TORCH,), (TORCH, "auto-round==0.16.1", "transformers==5.23.0", *_BUILDER)),
        _chats,
    ),
    "olive": Tool(
        _script("olive_worker.py"),
        (
            (TORCH,),
            # Olive imports requests and datasets without requiring them
            (TORCH, "olive-ai==0.13.0", "transformers==5.23.0", "requests", "datasets", *_BUILDER),
        ),
        _chats,
    ),
    "llama.cpp": Tool(
        _llama,
        (("llama-cpp-python==0.3.36",),),
        _gguf_only,
        cmake="-DLLAVA_BUILD=OFF",  # pictures and sound
    ),
}


def install(name: str, peers: Path) -> bool:
    """Create a tool's environment, unless it is finished; whether anything was installed.

    Raises:
        InputError: pip failed.
    """
    tool = TOOLS[name]
    # one compiler at a time: it is the machine's memory and its other users' cores
    build = {"CMAKE_ARGS": tool.cmake, "CMAKE_BUILD_PARALLEL_LEVEL": "1"} if tool.cmake else None
    return bool(tool.installs) and create(peers / name, tool.installs, build)


def interpreter(name: str, peers: Path) -> str:
    """The Python interpreter that a tool runs in.

    Raises:
        InputError: It has no environment yet.
    """
    if not TOOLS[name].installs:
        return sys.executable
    python = peers.absolute() / name / "bin" / "python"
    if not python.is_file():
        raise InputError(
            f"{peers}: no environment for {name}; `python -m benchmarks.quantization setup`"
        )
    return str(python)


def environment(name: str) -> dict[str, str]:
    """A tool's environment variables; only ours see this repository, and none a hub."""
    ours = not TOOLS[name].installs
    kept = {key: value for key, value in os.environ.items() if ours or key != "PYTHONPATH"}
    return {**kept, "HF_HUB_OFFLINE": "1"}
