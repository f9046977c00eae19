"""Measure artifacts in turns, each loaded once in its own process.

The order changes every round, so that other load on the machine affects all artifacts alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.children import child
from benchmarks.export.exporters import EXPORTERS
from benchmarks.export.records import Speed
from benchmarks.export.speed import Turn, prompt_of
from caliport.core.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

WRITTEN = "as written"
PAUSE = 0.2  # seconds, until the threads of the previous artifact stop spinning


@dataclass(frozen=True)
class Course:
    """The work of every artifact: threads, prompt tokens, decoded tokens, turns."""

    threads: int
    prompt: int
    new_tokens: int
    rounds: int


def speeds(
    names: Sequence[str], checkpoint: Path, out: Path, course: Course
) -> tuple[list[Speed], dict[str, InputError]]:
    """Run the artifacts of these exporters; ONNX also with the same session options for all.

    Args:
        names: Names in ``EXPORTERS``; the artifact of each is ``out / name``.
        checkpoint: The checkpoint they were made from.
        out: The directory of the run.
        course: The work to do.

    Returns:
        The measurements, and the errors of artifacts that cannot be run.
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
    """A worker process that answers lines with JSON.

    Args:
        module: The module that it runs.
        arguments: Arguments of the module.
        artifact: Its artifact, for its log and for messages.
        threads: Threads of OpenMP.
        python: The interpreter and its option before ``module``; default this one.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        artifact: Path,
        threads: int,
        python: Sequence[str] | None = None,
    ) -> None:
        self._artifact = artifact
        self._log = artifact.with_name(f"{artifact.name}.run.log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*(child(module) if python is None else [*python, module]), *arguments],
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def ask(self, line: str) -> Any:
        """Send a line and read the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # reading the answer gives a better error
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """Read an answer.

        Raises:
            InputError: The process has ended instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.stop()
            said = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line for line in reversed(said) if line.strip()), "no output")
            raise InputError(f"{self._artifact}: {last} (full output in {self._log})")
        return json.loads(line)

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


class Worker(Process):
    """A worker process with an artifact.

    Attributes:
        logits: Logits after the prompt.
        turns: Times of its turns so far.
    """

    def __init__(self, runtime: str, directory: Path, course: Course) -> None:
        numbers = map(str, (course.threads, course.prompt, course.new_tokens))
        arguments = [runtime, str(directory), *numbers]
        super().__init__("benchmarks.export.speed", arguments, directory, course.threads)
        self.logits = np.array(self.answer(), np.float32)
        self.turns: list[Turn] = []

    def turn(self) -> None:
        """Run one turn."""
        self.turns.append(Turn(*self.ask("go")))


def take_turns(workers: Mapping[tuple[str, str], Worker], rounds: int) -> None:
    """Run rounds of one turn for each worker, in a new order every round."""
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
    """A copy of a directory whose only session option is the number of threads.

    The files are hard links: ONNX Runtime does not follow symbolic links out of the directory.
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
    """Cosine of the angle between two vectors."""
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
