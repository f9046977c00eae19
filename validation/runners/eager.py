"""Run an eager PyTorch model token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from caliport.core.checkpoints import longest_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EagerRunner:
    """A transformers causal language model as a ``Runner``, with its own cache.

    Args:
        model: In eval mode, quantized or not.
        name: Names it in reasons and reports.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.name = name
        self.model = model
        self.context = longest_context(model.config)
        self._cache: Any = None

    def prefill(self, tokens: list[int]) -> np.ndarray:
        """Clear the cache, read ``tokens``; logits after the last, float32 [vocab]."""
        self.reset()
        return self._forward(tokens)

    def step(self, token: int) -> np.ndarray:
        """Read one more token; logits after it, float32 [vocab]."""
        return self._forward([token])

    def reset(self) -> None:
        """Clear the cache."""
        self._cache = None

    def logits(self, tokens: Sequence[int], last: int = 0) -> np.ndarray:
        """Logits in one pass without a cache, float32 [last, vocab]; 0 is after every token.

        No cache is involved, so a reference made this way cannot share a cache's faults.
        """
        import torch

        with torch.no_grad():
            out = self.model(torch.tensor([list(tokens)]), use_cache=False, logits_to_keep=last)
        return np.asarray(out.logits[0].float().numpy())

    def _forward(self, tokens: Sequence[int]) -> np.ndarray:
        import torch

        with torch.no_grad():
            out = self.model(
                torch.tensor([list(tokens)]),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = out.past_key_values
        return np.asarray(out.logits[0, -1].float().numpy())
