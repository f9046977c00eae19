"""The protocol of everything that turns tokens into logits, and greedy decoding with it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Runner(Protocol):
    """A model with its key-value cache, fed token by token.

    Attributes:
        name: Names the runner in reasons and reports.
        context: Most tokens that the cache holds.
    """

    name: str
    context: int

    def prefill(self, tokens: list[int]) -> np.ndarray:
        """Clear the cache, read ``tokens``; logits after the last, float32 [vocab]."""
        ...

    def step(self, token: int) -> np.ndarray:
        """Read one more token; logits after it, float32 [vocab]."""
        ...

    def reset(self) -> None:
        """Clear the cache."""
        ...


def greedy(
    runner: Runner, prompt: list[int], max_new_tokens: int, eos_ids: Collection[int]
) -> list[int]:
    """The most likely token at every step, lowest id first among equals.

    Returns:
        At most ``max_new_tokens`` tokens, fewer where the context is full. If a token of
        ``eos_ids`` ended the text, it is the last.
    """
    logits = runner.prefill(prompt)
    room = min(max_new_tokens, runner.context - len(prompt))
    tokens: list[int] = []
    while len(tokens) < room:
        tokens.append(int(np.argmax(logits)))
        if tokens[-1] in eos_ids or len(tokens) == room:
            break
        logits = runner.step(tokens[-1])
    return tokens
