"""llama.cpp's models as a ``Runner``, through a process in its own environment."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np

from caliport.core.errors import InputError

WORKER = Path(__file__).with_name("llama_worker.py")


class LlamaRunner:
    """A ``.gguf`` with its key-value cache, fed token by token.

    Args:
        model: The ``.gguf`` file.
        python: Interpreter of the environment with ``llama-cpp-python``.
        threads: Threads of llama.cpp.
        context: Most tokens that the cache holds.
        vocabulary: Number of logits.
    """

    def __init__(
        self, model: Path, python: str, threads: int, context: int, vocabulary: int
    ) -> None:
        self.name = "llama.cpp"
        self.context = context
        self._model = model
        self._bytes = 4 * vocabulary
        command = [python, "-P", str(WORKER), "serve", str(model), str(threads), str(context)]
        self._log = model.with_name("run.log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )

    def prefill(self, tokens: list[int]) -> np.ndarray:
        """Clear the cache, read ``tokens``; logits after the last, float32 [vocab]."""
        self.reset()
        return self._read(tokens)

    def step(self, token: int) -> np.ndarray:
        """Read one more token; logits after it, float32 [vocab]."""
        return self._read([token])

    def reset(self) -> None:
        """Clear the cache."""
        self._send([])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _send(self, tokens: list[int]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{json.dumps(tokens)}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise InputError(f"{self._model}: llama.cpp has ended; see {self._log}") from None

    def _read(self, tokens: list[int]) -> np.ndarray:
        self._send(tokens)
        assert self._process.stdout is not None
        found = self._process.stdout.read(self._bytes)
        if len(found) < self._bytes:
            raise InputError(f"{self._model}: llama.cpp has ended; see {self._log}")
        return np.frombuffer(found, np.float32)
