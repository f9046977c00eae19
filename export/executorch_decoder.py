"""The decoder as it is traced for ExecuTorch: attention is ``llama.custom_sdpa``.

The modelling code stays Hugging Face's own. Two things are put in its place while it is traced:
attention, and the cache, which is written by ``llama.update_cache``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import CacheLayerMixin

from export.support import check_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = "caliport_executorch"


class _CacheLayer(CacheLayerMixin):
    """One layer's keys and values, [1, context, heads, dim] each, written in place."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True
        self.start = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take [1, heads, n, dim] each; return the whole cache as [1, context, heads, dim]."""
        torch.ops.llama.update_cache(key_states.transpose(1, 2), self.keys, self.start)
        torch.ops.llama.update_cache(value_states.transpose(1, 2), self.values, self.start)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[1], 0

    def get_seq_length(self) -> int:
        return self.start

    def get_max_length(self) -> int:
        return self.keys.shape[1]


class Decoder(nn.Module):
    """The traced method ``forward``; see ``export.executorch.lower`` for its meaning."""

    def __init__(self, model: PreTrainedModel, context: int) -> None:
        super().__init__()
        self.model = model
        self.context = context
        config = model.config.get_text_config()
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.layers = config.num_hidden_layers
        for index in range(self.layers):
            for name in ("keys", "values"):
                self.register_buffer(f"{name}_{index}", torch.zeros(1, context, heads, dim))

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """Logits float32 [1, 1, vocab] of the last of ``tokens`` [1, n], which begin at a position.

        Args:
            tokens: int64 [1, n].
            input_pos: int64 [1], the position of the first.
        """
        start = input_pos[0].item()
        torch._check(start >= 0)
        torch._check(start + tokens.shape[1] <= self.context)
        cache = Cache(layers=[self._layer(index, start) for index in range(self.layers)])
        positions = torch.arange(tokens.shape[1]).unsqueeze(0) + start
        with _custom_attention(self.model, start):
            return self.model(
                input_ids=tokens,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits

    def _layer(self, index: int, start: Any) -> _CacheLayer:
        layer = _CacheLayer(getattr(self, f"keys_{index}"), getattr(self, f"values_{index}"))
        layer.start = start
        return layer


def _attention_from(start: Any) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        _module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        check_attention(kwargs, "executorch")
        out = torch.ops.llama.custom_sdpa(
            query.transpose(1, 2), key, value, start, None, 0.0, True, scaling
        )
        return out, None

    return attention


@contextmanager
def _custom_attention(model: PreTrainedModel, start: Any) -> Iterator[None]:
    """Let the model attend through ``llama.custom_sdpa``, which masks by position itself."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    AttentionInterface.register(_ATTENTION, _attention_from(start))
    AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
        AttentionInterface._global_mapping.pop(_ATTENTION)
        AttentionMaskInterface._global_mapping.pop(_ATTENTION)
