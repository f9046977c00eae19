"""A worker process that loads an artifact and answers every input line with one turn's times.

A turn prefills the prompt and decodes tokens greedily: ``prefill`` is the time to the first token,
``decode`` the time of the others.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np


class Turn(NamedTuple):
    """Times of a turn, in seconds."""

    prefill: float
    decode: float


class Loaded(Protocol):
    """An artifact in memory."""

    def turn(self, prompt: list[int], new_tokens: int) -> Turn:
        """Read the prompt and write ``new_tokens`` tokens."""
        ...

    def logits(self, prompt: list[int]) -> np.ndarray:
        """Logits after the prompt, float32 [vocab]."""
        ...


def prompt_of(length: int) -> list[int]:
    """Token ids that every byte-level vocabulary of this benchmark has."""
    draw = random.Random(0)
    return [draw.randrange(256) for _ in range(length)]


class ExecuTorchProgram:
    """A ``.pte`` with ``forward(tokens, position)``, by caliport or another exporter.

    Args:
        directory: Directory with a single ``.pte``.
        threads: Threads of ExecuTorch's pool.
    """

    def __init__(self, directory: Path, threads: int) -> None:
        import executorch.extension.llm.custom_ops.custom_ops
        import executorch.kernels.quantized  # noqa: F401
        from executorch.extension.pybindings import portable_lib

        portable_lib._unsafe_reset_threadpool(threads)
        (program,) = directory.glob("*.pte")
        self._module = portable_lib._load_for_executorch(str(program))
        # a single number, or the position of every token
        positions = self._module.method_meta("forward").input_tensor_meta(1).sizes()
        self._every = positions[0] > 1

    def turn(self, prompt: list[int], new_tokens: int) -> Turn:
        """Read the prompt and write ``new_tokens`` tokens."""
        start = time.perf_counter()
        token = int(self._forward(prompt, 0).argmax())
        first = time.perf_counter()
        for position in range(len(prompt), len(prompt) + new_tokens - 1):
            token = int(self._forward([token], position).argmax())
        return Turn(first - start, time.perf_counter() - first)

    def logits(self, prompt: list[int]) -> np.ndarray:
        """Logits after the prompt, float32 [vocab]."""
        found: np.ndarray = self._forward(prompt, 0).float().numpy().copy()
        return found

    def _forward(self, tokens: list[int], position: int) -> Any:
        import torch

        count = len(tokens) if self._every else 1
        inputs = [torch.tensor([tokens]), torch.arange(position, position + count)]
        out = self._module.forward(inputs, clone_outputs=False)[0]
        return out.reshape(-1, out.shape[-1])[-1]  # some programs return all tokens' logits


class GenaiDirectory:
    """A directory that ``onnxruntime_genai`` runs with the directory's own configuration."""

    def __init__(self, directory: Path, threads: int) -> None:
        import onnxruntime_genai as genai

        self._genai = genai
        self._model = genai.Model(str(directory))

    def turn(self, prompt: list[int], new_tokens: int) -> Turn:
        """Read the prompt and write ``new_tokens`` tokens."""
        generator = self._generator(len(prompt) + new_tokens, len(prompt) + new_tokens)
        start = time.perf_counter()
        self._read(generator, prompt)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
        return Turn(first - start, time.perf_counter() - first)

    def logits(self, prompt: list[int]) -> np.ndarray:
        """Logits after the prompt, float32 [vocab]."""
        generator = self._generator(0, len(prompt) + 1)
        self._read(generator, prompt)
        found: np.ndarray = generator.get_logits()
        return found.reshape(-1, found.shape[-1])[-1]

    def _generator(self, least: int, most: int) -> Any:
        settings = self._genai.GeneratorParams(self._model)
        settings.set_search_options(min_length=least, max_length=most, do_sample=False)
        return self._genai.Generator(self._model, settings)

    def _read(self, generator: Any, prompt: list[int]) -> None:
        import numpy as np

        generator.append_tokens(np.array([prompt], np.int32))


LOADERS: dict[str, Callable[[Path, int], Loaded]] = {
    "executorch": ExecuTorchProgram,
    "onnx": GenaiDirectory,
}


def work(runtime: str, directory: Path, threads: int, prompt_tokens: int, new_tokens: int) -> None:
    """Load an artifact, print its logits, and answer every input line with a turn.

    The runtimes also print to standard output; their output is redirected to standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prompt = prompt_of(prompt_tokens)
    loaded = LOADERS[runtime](directory, threads)
    logits = loaded.logits(prompt).tolist()
    loaded.turn(prompt, new_tokens)
    print(json.dumps(logits), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(loaded.turn(prompt, new_tokens)), file=answers, flush=True)


if __name__ == "__main__":
    _, _runtime, _directory, *_numbers = sys.argv
    work(_runtime, Path(_directory), *map(int, _numbers))
