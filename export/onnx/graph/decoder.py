"""The decoder that is traced for ONNX, with ONNX Runtime's ``GroupQueryAttention`` as attention.

The modelling code is Hugging Face's own. While it is traced, its attention is replaced by this
operator, which applies the causal mask and updates the cache. Compared with the attention that the
exporter of transformers 5.23 fuses afterwards, tracing takes a third less time, no mask of the size
of the context is needed, and onnxruntime_genai can keep past and present in one buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from caliport.export.decoder.attention import (
    attended,
    check_attended,
    check_attention,
    check_cache,
    window_of,
)
from caliport.export.decoder.patches.own_attention import own_attention
from caliport.export.decoder.patches.short_rotary import short_rotary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from caliport.export.onnx.graph.rotary import Rotary


class Decoder(nn.Module):
    """The module that is traced; ``forward`` has the names and shapes of the graph's inputs.

    Args:
        model: A decoder that ``caliport.export.decoder.checks.check_exportable`` passes.
        rotary: Its rotary embeddings, which the attention operator applies if it can.
    """

    def __init__(self, model: PreTrainedModel, rotary: Rotary) -> None:
        super().__init__()
        self.model = model
        self.rotary = rotary

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Logits of the last of n new tokens, and the cache with the new tokens added.

        Args:
            input_ids: int64 [1, n].
            attention_mask: int64 [1, total], all ones; total = cached + n. Only its size and sum
                are used, which without padding are the number of tokens.
            position_ids: int64 [1, n].
            past: Key and value of each layer, [1, kv heads, cached, head size].

        Raises:
            InputError: During tracing, for attention or caches that cannot be exported.
        """
        total = attention_mask.sum(dim=1, dtype=torch.int32)
        layers = [_CacheLayer(*past[i : i + 2]) for i in range(0, len(past), 2)]
        attention = _attention_over(layers, total, attention_mask.shape[1], self.rotary)
        with (
            own_attention(self.model, attention, _mask),
            short_rotary(self.model),
            self.rotary.watching(self.model),
        ):
            logits = self.model(
                input_ids=input_ids,
                position_ids=position_ids,
                past_key_values=Cache(layers=list(layers)),
                use_cache=True,
                logits_to_keep=1,
            ).logits
        check_attended(layers)
        outputs = {"logits": logits}
        for index, layer in enumerate(layers):
            assert layer.keys is not None
            assert layer.values is not None
            outputs[f"present.{index}.key"] = layer.keys
            outputs[f"present.{index}.value"] = layer.values
        return outputs


class _CacheLayer(CacheLayerMixin):
    """One layer's past keys and values; the attention operator returns the present ones."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True
        self.given: tuple[Tensor, Tensor] | None = None
        self.attended = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return only the new keys and values; the attention operator appends them to the past."""
        self.given = (key_states, value_states)
        return self.given

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        """Not called, since positions are always given."""
        return 0

    def get_max_length(self) -> int:
        return -1


@dataclass(frozen=True)
class _Window:
    """Passed instead of a mask: the operator masks by itself and only needs the window."""

    size: int


def _mask(**options: Any) -> _Window | None:
    """The value passed to a layer's attention as its mask; None for plain causal attention."""
    window = window_of(options)
    return None if window is None else _Window(window)


def _attention_over(
    layers: list[_CacheLayer], total: Tensor, size: int, rotary: Rotary
) -> Callable[..., tuple[Tensor, None]]:
    """Make the attention function over new tokens and the cache.

    Source: ``com.microsoft.GroupQueryAttention`` in
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.

    Args:
        layers: Past keys and values.
        total: Number of tokens after this pass, int32 [1].
        size: The same number, as a tensor size.
        rotary: The rotary embeddings that were applied to queries and keys.
    """

    def attention(
        _module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: _Window | Tensor | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if isinstance(attention_mask, Tensor):
            kwargs["attention_mask"] = attention_mask
        check_attention(kwargs, "onnx")
        index, layer = attended(layers, key, value)
        assert layer.keys is not None
        batch, heads, count, dim = query.shape
        kv_heads = int(layer.keys.shape[1])
        check_cache(index, (key, value), kv_heads, dim)
        attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads}
        if scaling is not None:
            attributes["scale"] = float(scaling)
        if softcap is not None:
            attributes["softcap"] = float(softcap)
        if isinstance(attention_mask, _Window):
            attributes["local_window_size"] = attention_mask.size
        turned = rotary.before(query, key)
        tables: tuple[Tensor, ...] = ()
        if turned is not None:
            query, key, tables = turned.query, turned.key, (turned.cos, turned.sin)
            attributes["do_rotary"] = 1
        new = [states.transpose(1, 2).flatten(2) for states in (query, key, value)]
        cache = [batch, kv_heads, size, dim]
        out, layer.keys, layer.values = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (*new, layer.keys, layer.values, total - 1, total, *tables),
            attributes,
            dtypes=(query.dtype,) * 3,
            shapes=([batch, count, heads * dim], cache, cache),
            version=1,
        )
        return out.unflatten(2, (heads, dim)), None

    return attention
