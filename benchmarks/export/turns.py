"""Every artifact is loaded once in a process of its own, and then they take turns.

Taking turns in a new order each round gives every artifact the same share of whatever else the
machine does.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.export.exporters import EXPORTERS
from benchmarks.export.records import Speed
from benchmarks.export.speed import Turn, prompt_of
from caliport.core.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

WRITTEN = "as written"
PAUSE = 0.2  # seconds, in which the threads of the last one stop spinning


@dataclass(frozen=True)
class Course:
    """What every artifact has to do: threads, tokens of the prompt and after it, turns."""

    threads: int
    prompt: int
    new_tokens: int
    rounds: int


def speeds(
    names: Sequence[str], checkpoint: Path, out: Path, course: Course
) -> tuple[list[Speed], dict[str, InputError]]:
    """Run the artifacts of these exporters; ONNX also with the same session options for all.

    Args:
        names: In ``EXPORTERS``; the artifact of each is ``out / name``.
        checkpoint: What they were made from.
        out: The directory of the run.
        course: What they have to do.

    Returns:
        What was measured, and why the artifacts that are not in it cannot be run.
    """
    places: dict[tuple[str, str], Path] = {}
    for name in names:
        onnx = EXPORTERS[name].runtime == "onnx"
        places[name, WRITTEN if onnx else ""] = out / name
        if onnx:
            variant = f"`intra_op_num_threads: {course.threads}`"
            places[name, variant] = with_threads(out / name, course.threads)
    reference = reference_logits(checkpoint, prompt_of(course.prompt))
    workers: dict[tuple[str, str], Worker] = {}
    unfit: dict[str, InputError] = {}
    try:
        for key, directory in places.items():
            try:
                workers[key] = Worker(EXPORTERS[key[0]].runtime, directory, course)
            except InputError as error:
                unfit[key[0]] = error
        take_turns(workers, course.rounds)
    finally:
        for worker in workers.values():
            worker.stop()
    found = [
        Speed(
            exporter=name,
            variant=variant,
            prefill=[course.prompt / turn.prefill for turn in worker.turns],
            decode=[(course.new_tokens - 1) / turn.decode for turn in worker.turns],
            cosine=cosine(worker.logits, reference),
        )
        for (name, variant), worker in workers.items()
    ]
    return found, unfit


class Process:
    """A process of ours that answers lines with JSON.

    Args:
        module: What it runs.
        arguments: Of the module.
        artifact: What it holds, for its log and for messages.
        threads: What OpenMP is told to use.
    """

    def __init__(self, module: str, arguments: Sequence[str], artifact: Path, threads: int) -> None:
        self._artifact = artifact
        self._log = artifact.with_name(f"{artifact.name}.run.log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def ask(self, line: str) -> Any:
        """Write a line and read the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer says more
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """Read an answer; a process that has ended instead is stopped.

        Raises:
            InputError: It has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.stop()
            said = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line for line in reversed(said) if line.strip()), "nothing was said")
            raise InputError(f"{self._artifact}: {last} (all of it is in {self._log})")
        return json.loads(line)

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


class Worker(Process):
    """A process that holds an artifact.

    Attributes:
        logits: After the prompt.
        turns: Those it has had.
    """

    def __init__(self, runtime: str, directory: Path, course: Course) -> None:
        numbers = map(str, (course.threads, course.prompt, course.new_tokens))
        arguments = [runtime, str(directory), *numbers]
        super().__init__("benchmarks.export.speed", arguments, directory, course.threads)
        self.logits = np.array(self.answer(), np.float32)
        self.turns: list[Turn] = []

    def turn(self) -> None:
        """Let it have a turn."""
        self.turns.append(Turn(*self.ask("go")))


def take_turns(workers: Mapping[tuple[str, str], Worker], rounds: int) -> None:
    """Rounds of one turn each, in a new order every time."""
    draw = random.Random(0)
    for _ in range(rounds):
        for name in draw.sample(list(workers), len(workers)):
            time.sleep(PAUSE)
            workers[name].turn()


def reference_logits(checkpoint: Path, prompt: list[int]) -> NDArray[np.float32]:
    """Logits of the float32 checkpoint after the prompt, float32 [vocab]."""
    import torch

    from caliport.core.checkpoints import load_base
    from caliport.core.patching import quiet

    with quiet():
        model = load_base(checkpoint)
    with torch.no_grad():
        out = model(torch.tensor([prompt]), use_cache=False, logits_to_keep=1)
    return np.array(out.logits[0, -1].numpy(), np.float32)


def with_threads(artifact: Path, threads: int) -> Path:
    """A directory of the same files whose session options are the number of threads alone.

    The files are hard links: ONNX Runtime follows no symbolic link out of the directory.
    """
    copy = artifact.with_name(f"{artifact.name}.threads")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(artifact, copy, copy_function=os.link)
    path = copy / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"] = {"intra_op_num_threads": threads}
    path.unlink()
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return copy


def cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Of the angle between two vectors."""
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
