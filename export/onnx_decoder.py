"""The decoder as it is traced for ONNX: attention is ONNX Runtime's ``GroupQueryAttention``.

The modelling code stays Hugging Face's own. While it is traced, its attention is replaced by the
operator that masks causally by itself and keeps the cache. Against the attention that transformers'
exporter 5.23 fuses afterwards this needs a third less time to trace, no mask of the size of the
context, and lets onnxruntime_genai keep past and present in one buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import CacheLayerMixin

from export.support import check_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = "caliport_onnx"


class Decoder(nn.Module):
    """The traced method; names and shapes are those of the graph's inputs and outputs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Logits of the last of n tokens after some cached ones, and the longer cache.

        Args:
            input_ids: int64 [1, n].
            attention_mask: int64 [1, total], all ones; total = cached + n. Only its size and sum
                are used: without padding they say how many tokens there are.
            position_ids: int64 [1, n].
            past: Key and value of each layer, [1, kv heads, cached, head size].
        """
        total = attention_mask.sum(dim=1, dtype=torch.int32)
        layers = [_CacheLayer(*past[i : i + 2]) for i in range(0, len(past), 2)]
        attention = _attention_over(layers, total, attention_mask.shape[1])
        with _use_attention(self.model, attention):
            logits = self.model(
                input_ids=input_ids,
                position_ids=position_ids,
                past_key_values=Cache(layers=list(layers)),
                use_cache=True,
                logits_to_keep=1,
            ).logits
        outputs = {"logits": logits}
        for index, layer in enumerate(layers):
            assert layer.keys is not None
            assert layer.values is not None
            outputs[f"present.{index}.key"] = layer.keys
            outputs[f"present.{index}.value"] = layer.values
        return outputs


class _CacheLayer(CacheLayerMixin):
    """One layer's past, which the attention itself replaces by the present."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values alone; the attention joins them to the past."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        """Not asked for where positions are given, and they are."""
        return 0

    def get_max_length(self) -> int:
        return -1


def _attention_over(
    layers: list[_CacheLayer], total: Tensor, size: int
) -> Callable[..., tuple[Tensor, None]]:
    """Attention over new tokens and the cache.

    Source: ``com.microsoft.GroupQueryAttention`` in
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.

    Args:
        layers: Past keys and values.
        total: Tokens after this pass, int32 [1].
        size: The same number as a size.
    """

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        check_attention(kwargs, "onnx")
        layer = layers[module.layer_idx]  # type: ignore[index]
        batch, heads, count, dim = query.shape
        kv_heads = key.shape[1]
        attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads}
        if scaling is not None:
            attributes["scale"] = float(scaling)
        new = [states.transpose(1, 2).flatten(2) for states in (query, key, value)]
        cache = [batch, kv_heads, size, dim]
        out, layer.keys, layer.values = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (*new, layer.keys, layer.values, total - 1, total),
            attributes,
            dtypes=(query.dtype,) * 3,
            shapes=([batch, count, heads * dim], cache, cache),
            version=1,
        )
        return out.unflatten(2, (heads, dim)), None

    return attention


@contextmanager
def _use_attention(model: PreTrainedModel, attention: Callable[..., Any]) -> Iterator[None]:
    config = model.config.get_text_config()
    before = config._attn_implementation
    AttentionInterface.register(_ATTENTION, attention)
    AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
        AttentionInterface._global_mapping.pop(_ATTENTION)
        AttentionMaskInterface._global_mapping.pop(_ATTENTION)
