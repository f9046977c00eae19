"""Runners of a device, how they are started and what they say.

Two kinds: one that takes a ``Job`` (our ONNX runner, and for programs of ExecuTorch on Linux our
Python), and ExecuTorch's stock ``llama_main``, which takes a text and prints one.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from caliport.android_harness.runners.job import Answer, Job, Row
from caliport.core.directories import MANIFEST, check_files, read_manifest
from caliport.core.errors import InputError
from caliport.validation.records.record import Record
from caliport.validation.runners.runner import greedy

if TYPE_CHECKING:
    from caliport.validation.runners.runner import Runner

_OBSERVER = "PyTorchObserver "
_PLACE = "{runner}"


@dataclass(frozen=True)
class JobRunner:
    """A program that takes a ``Job``.

    Attributes:
        runtime: The artifacts that it runs, ``onnx`` or ``executorch``.
        directory: What must be on the device; None for a program that is there already.
        command: How it is started, ``{runner}`` being ``directory`` on the device.
    """

    runtime: str
    directory: Path | None
    command: tuple[str, ...]

    def started(self, place: str, job: str, result: str) -> list[str]:
        """The command when ``directory`` lies at ``place`` and the files are so named."""
        return [*(part.replace(_PLACE, place) for part in self.command), job, result]


def read_runner(directory: Path) -> JobRunner:
    """What ``caliport runner build`` made.

    Raises:
        InputError: Not such a directory, or not the files that its manifest records.
    """
    manifest = read_manifest(directory)
    if manifest.get("stage") != "runner":
        raise InputError(
            f"{directory / MANIFEST}: not of a runner; expected what caliport runner build made"
        )
    check_files(directory)
    return JobRunner(manifest["runtime"], directory, tuple(manifest["command"]))


def executorch_runner() -> JobRunner:
    """Our Python around ExecuTorch's binding, for a Linux device that shares this environment."""
    return JobRunner(
        "executorch",
        None,
        (sys.executable, "-m", "caliport.android_harness.runners.executorch_python"),
    )


def answers(runner: Runner, job: Job) -> tuple[Answer, ...]:
    """What a runner of this process says to a job's prompts: what a device is held to.

    Raises:
        InputError: A prompt or target that the runner refuses.
    """
    found = []
    for prompt in job.prompts:
        rows = []
        for i in range(len(prompt.targets)):
            read = runner.prefill(list(prompt.tokens)) if i == 0 else None
            logits = runner.step(prompt.targets[i - 1]) if read is None else read
            rows.append(row_of(logits, job.top))
        tokens = None
        if prompt.write:
            tokens = tuple(greedy(runner, list(prompt.tokens), job.max_new_tokens, job.ends))
        found.append(Answer(tokens=tokens, rows=tuple(rows)))
    return tuple(found)


def row_of(logits: np.ndarray, top: int) -> Row:
    """The ``Row`` of logits float32 [vocab].

    Raises:
        InputError: One is not finite.
    """
    if not np.isfinite(logits).all():
        raise InputError("logits: found one that is not finite, expected an artifact that computes")
    ids = np.argsort(-logits, kind="stable")[:top]
    wide = logits.astype(np.float64)
    largest = wide[ids[0]]
    return Row(
        ids=tuple(int(i) for i in ids),
        logits=tuple(float(x) for x in wide[ids]),
        mean=float(wide.mean()),
        logsumexp=float(largest + np.log(np.exp(wide - largest).sum())),
    )


class LlamaMain(Record):
    """What ``llama_main`` said.

    Attributes:
        text: The new text, without the prompt that it repeats.
        prompt_tokens: Of the prompt.
        decoded_tokens: After the first, which comes with the prompt.
        load_seconds: Of loading.
        first_token_seconds: From the start, which tokenizes the prompt, to the first token.
        decode_seconds: From then to the end, in which the others came.
    """

    text: str
    prompt_tokens: int
    decoded_tokens: int
    load_seconds: float
    first_token_seconds: float
    decode_seconds: float


def llama_main_flags(
    program: str,
    tokenizer: str,
    prompt: str,
    max_new_tokens: int,
    threads: int,
    method: str = "forward",
    bos: int = 0,
) -> list[str]:
    """Flags of ``llama_main`` (``examples/models/llama/main.cpp`` of ExecuTorch), greedy.

    Args:
        program: The ``.pte``, as the device names it.
        tokenizer: ``tokenizer.json``, as the device names it.
        prompt: The whole prompt.
        max_new_tokens: Most tokens to write.
        threads: Of ExecuTorch's pool.
        method: Which of the program's methods to run; a bundle has one for each composition.
        bos: Begin tokens to put before the prompt. Versions of ``llama_main`` have read over it.
    """
    return [
        f"--model_path={program}",
        f"--tokenizer_path={tokenizer}",
        f"--prompt={prompt}",
        "--temperature=0",
        f"--max_new_tokens={max_new_tokens}",
        f"--cpu_threads={threads}",
        f"--method_name={method}",
        f"--num_bos={bos}",
    ]


def parse_llama_main(output: str, prompt: str) -> LlamaMain:
    """What the standard output of ``llama_main`` says: the prompt, the text, one line of figures.

    Raises:
        InputError: It has no such line, or one without the figures that are needed.
    """
    text, found, line = output.rpartition(_OBSERVER)
    try:
        told: dict[str, Any] = json.loads(line.splitlines()[0]) if found else {}
        unit = float(told["SCALING_FACTOR_UNITS_PER_SECOND"])
        return LlamaMain(
            text=text.removeprefix(prompt).removesuffix("\n"),
            prompt_tokens=told["prompt_tokens"],
            decoded_tokens=told["generated_tokens"],
            load_seconds=(told["model_load_end_ms"] - told["model_load_start_ms"]) / unit,
            first_token_seconds=(told["first_token_ms"] - told["inference_start_ms"]) / unit,
            decode_seconds=(told["inference_end_ms"] - told["first_token_ms"]) / unit,
        )
    except (ValueError, KeyError, IndexError, TypeError, ZeroDivisionError, ValidationError):
        shown = " ".join((line if found else output).split())[-80:]
        raise InputError(
            f"llama_main: found {shown!r}, expected a line of {_OBSERVER.strip()} with its figures"
        ) from None
