"""Run in llama.cpp's environment, without caliport: quantize a ``.gguf``, or answer with logits.

    python -P llama_worker.py quantize IN OUT Q4_0
    python -P llama_worker.py serve MODEL THREADS CONTEXT
    python -P llama_worker.py turns MODEL THREADS PROMPT NEW

``serve`` reads JSON lists of tokens; an empty one clears the cache, another is read and answered
with the logits after its last token as float32 bytes. ``turns`` does as ``export/speed.py``.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

import llama_cpp as llama
import numpy as np


def quantize(source: str, out: str, kind: str) -> None:
    """Quantize again: llama.cpp turns the file's weights into floats first."""
    settings = llama.llama_model_quantize_default_params()
    settings.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.allow_requantize = True
    if llama.llama_model_quantize(source.encode(), out.encode(), settings):
        sys.exit(f"{source}: llama.cpp cannot quantize it to {kind}")


class Model:
    """A ``.gguf`` in memory with its cache."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        self._llama = llama.Llama(
            path,
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            n_batch=512,
            n_gpu_layers=0,
            verbose=False,
        )

    def read(self, tokens: list[int]) -> np.ndarray:
        """Logits after the last token, float32 [vocab]."""
        self._llama.eval(tokens)
        count = self._llama.n_vocab()
        return np.ctypeslib.as_array(
            llama.llama_get_logits_ith(self._llama.ctx, -1), (count,)
        ).astype(np.float32)

    def reset(self) -> None:
        """Clear the cache."""
        self._llama.reset()  # the next tokens take the old ones' places

    def turn(self, prompt: list[int], new_tokens: int) -> tuple[float, float]:
        """Seconds to the first token, and of the others."""
        self.reset()
        start = time.perf_counter()
        token = int(self.read(prompt).argmax())
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = int(self.read([token]).argmax())
        return first - start, time.perf_counter() - first


def serve(model: Model, answers: Any) -> None:
    """Answer every line of standard input with logits."""
    for line in sys.stdin:
        tokens = json.loads(line)
        if tokens:
            answers.write(model.read(tokens).tobytes())
            answers.flush()
        else:
            model.reset()


def turns(model: Model, prompt: list[int], new_tokens: int, answers: Any) -> None:
    """Print the logits after the prompt, and answer every line with a turn."""
    logits = model.read(prompt).tolist()
    model.turn(prompt, new_tokens)
    answers.write(f"{json.dumps(logits)}\n".encode())
    answers.flush()
    for _ in sys.stdin:
        answers.write(f"{json.dumps(model.turn(prompt, new_tokens))}\n".encode())
        answers.flush()


def main() -> None:
    """See above."""
    what, *rest = sys.argv[1:]
    if what == "quantize":
        quantize(*rest)
        return
    # llama.cpp prints to standard output too
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    path, threads, *numbers = rest[0], *map(int, rest[1:])
    if what == "serve":
        serve(Model(path, threads, numbers[0]), answers)
    else:
        length, new_tokens = numbers
        draw = random.Random(0)
        prompt = [draw.randrange(256) for _ in range(length)]  # as speed.prompt_of
        turns(Model(path, threads, length + new_tokens), prompt, new_tokens, answers)


if __name__ == "__main__":
    main()
