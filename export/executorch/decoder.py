"""The decoder that is traced for ExecuTorch, with ``llama.custom_sdpa`` as attention.

The modelling code is Hugging Face's own. Two parts are replaced while it is traced: attention, and
the cache, which is written by ``llama.update_cache``. An int8 cache is read by
``llama.custom_quantized_sdpa`` (see ``caliport.export.quantization.cache``).

The kernel applies the causal mask itself. Layers with a window narrower than the context pass it a
mask; it then reads the whole cache, not only the filled part. It does not support soft-capping:
models that cap their attention scores use attention composed of matrix products that XNNPACK runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from caliport.core.errors import InputError
from caliport.export.decoder.attention import (
    attended,
    check_attended,
    check_attention,
    check_cache,
    window_of,
)
from caliport.export.decoder.parts import cache_shape
from caliport.export.decoder.patches.own_attention import own_attention
from caliport.export.decoder.patches.short_rotary import short_rotary
from caliport.export.executorch.patches.tanh_gelu import tanh_gelu
from caliport.export.quantization.cache import rounded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Buffers of a layer's keys, or of its values: name suffix and type, by the bits of the cache.
_PARTS = {
    None: {"": torch.float32},
    8: {"": torch.int8, "_scale": torch.float32, "_zero": torch.int8},
}
# Added to the score of a masked key. Finite, so that a fully masked row gives no NaN.
_UNSEEN = -1e9


class _CacheLayer(CacheLayerMixin):
    """One layer's keys and values, written in place.

    Args:
        keys: [1, context, heads, dim], or [heads, context, 1, dim] if attention is composed of
            products by head. ``llama.update_cache`` writes either. int8 keys are followed by their
            scales and zero points, [1, context, heads, 1].
        values: As ``keys``.
        start: Position of the first new token.
        index: Index of the layer.
    """

    keys: Tensor
    values: Tensor

    def __init__(
        self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], start: Any, index: int
    ) -> None:
        super().__init__()
        self.keys, self.values = keys[0], values[0]
        self.cached = keys, values
        self.is_initialized = True
        self.start, self.index = start, index
        self.given: tuple[Tensor, Tensor] | None = None
        self.attended = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values, [1, heads, n, dim] each; return the whole cache."""
        first, _, heads, dim = self.keys.shape
        check_cache(self.index, (key_states, value_states), first * heads, dim)
        for new, cache in zip((key_states, value_states), self.cached, strict=True):
            rows = new.transpose(1, 2) if first == 1 else new.squeeze(0).unsqueeze(2)
            for part, held in zip(rounded(rows) if len(cache) > 1 else [rows], cache, strict=True):
                torch.ops.llama.update_cache(part, held, self.start)
        self.given = (self.keys, self.values)
        return self.given

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[1], 0

    def get_seq_length(self) -> int:
        return self.start

    def get_max_length(self) -> int:
        return self.keys.shape[1]


class Decoder(nn.Module):
    """The module that is traced; ``caliport.export.executorch.lower.lower`` describes ``forward``.

    Args:
        model: A decoder that ``caliport.export.decoder.checks.check_exportable`` passes.
        context: Length of the cache in tokens.
        cache_bits: 8 for keys and values in int8, None for float32.
    """

    def __init__(self, model: PreTrainedModel, context: int, cache_bits: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.context = context
        self.parts = _PARTS[cache_bits]
        config = model.config.get_text_config()
        heads, dim = cache_shape(config)
        self.layers = config.num_hidden_layers
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        self.groups = config.num_attention_heads // heads if capped else None
        shape = (heads, context, 1, dim) if capped else (1, context, heads, dim)
        for index in range(self.layers):
            for name in ("keys", "values"):
                for part, dtype in self.parts.items():
                    held = torch.zeros((*shape[:3], 1) if part else shape, dtype=dtype)
                    self.register_buffer(f"{name}{part}_{index}", held)

    def _held(self, name: str, index: int) -> tuple[Tensor, ...]:
        return tuple(self.get_buffer(f"{name}{part}_{index}") for part in self.parts)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """Logits of the last token, float32 [1, 1, vocab].

        Args:
            tokens: int64 [1, n].
            input_pos: int64 [1], the position of the first token.

        Raises:
            InputError: During tracing, for attention or caches that cannot be exported.
        """
        start = input_pos[0].item()
        torch._check(start >= 0)
        torch._check(start + tokens.shape[1] <= self.context)
        layers = [
            _CacheLayer(self._held("keys", i), self._held("values", i), start, i)
            for i in range(self.layers)
        ]
        positions = torch.arange(tokens.shape[1]).unsqueeze(0) + start
        attention = _Attention(self.context, start, positions, layers, self.groups)
        with (
            own_attention(self.model, attention, attention.mask),
            short_rotary(self.model),
            tanh_gelu(),
        ):
            logits = self.model(
                input_ids=tokens,
                position_ids=positions,
                past_key_values=Cache(layers=list(layers)),
                use_cache=True,
                logits_to_keep=1,
            ).logits
        check_attended(layers)
        return logits


class _Attention:
    """Attention of new tokens to the cache in one pass.

    Args:
        context: Length of the cache in tokens.
        start: Position of the first new token.
        positions: Positions of the new tokens, int64 [1, n].
        layers: The caches, by index of the layer.
        groups: Query heads per key-value head if scores are soft-capped, with caches in the layout
            for that; otherwise None.
    """

    def __init__(
        self,
        context: int,
        start: Any,
        positions: Tensor,
        layers: list[_CacheLayer],
        groups: int | None,
    ) -> None:
        self.context, self.start, self.positions = context, start, positions
        self.layers, self.groups = layers, groups
        self.masks: list[Tensor] = []

    def mask(self, **options: Any) -> Tensor | None:
        """The mask for one kind of layer, float32 [n, context]; None if the kernel masks.

        For composed attention, the rows are repeated for every query head of a key-value head.
        Avoid arithmetic ops: XNNPACK would fuse them into some layer's delegate.
        """
        window = window_of(options) or self.context
        if window >= self.context and self.groups is None:
            return None
        queries, keys = self.positions.transpose(0, 1), torch.arange(self.context)
        seen = keys <= queries
        if window < self.context:
            seen = seen & (keys > queries - window)
        made = torch.where(seen, 0.0, _UNSEEN)
        self.masks.append(made if self.groups is None else made.repeat(self.groups, 1))
        return self.masks[-1]

    def __call__(
        self,
        _module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend with queries [1, heads, n, dim] to the whole cache; returns [1, n, heads, dim]."""
        if attention_mask is not None and all(attention_mask is not made for made in self.masks):
            kwargs["attention_mask"] = attention_mask
        check_attention(kwargs, "executorch")
        _, layer = attended(self.layers, key, value)
        if self.groups is not None:
            assert attention_mask is not None
            return _composed(query, key, value, attention_mask, scaling, softcap), None
        if softcap is not None:
            raise InputError(
                f"config.json: attention is soft-capped at {softcap}, expected that number as "
                "attn_logit_softcapping"
            )
        rest: tuple[Any, ...] = (self.start, attention_mask, 0.0, attention_mask is None, scaling)
        if len(layer.cached[0]) == 1:
            return torch.ops.llama.custom_sdpa(query.transpose(1, 2), key, value, *rest), None
        queries = rounded(query.transpose(1, 2))
        for _, scale, zero in (queries, *layer.cached):
            rest += (zero, scale)
        return torch.ops.llama.custom_quantized_sdpa(queries[0], key, value, *rest), None


def _composed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """softmax(c · tanh(q kᵀ · scaling / c) + mask) v, with scores soft-capped at c.

    Source: Gemma 2, https://arxiv.org/abs/2408.00118, section 2.

    Args:
        query: [1, heads, n, dim].
        key: [kv heads, context, 1, dim]. Used as the left factor of its product, because XNNPACK
            copies the right one.
        value: As ``key``.
        mask: [groups * n, context], where groups = heads / kv heads.
        scaling: Factor of the scores; default 1 / √dim.
        softcap: Bound c of the scores; None for no bound.

    Returns:
        [1, n, heads, dim].
    """
    heads, dim = query.shape[1], query.shape[3]
    key, value = key.view(-1, key.shape[1], dim), value.view(-1, key.shape[1], dim)
    groups = heads // key.shape[0]
    factor = dim**-0.5 if scaling is None else scaling
    grouped = query.squeeze(0).unflatten(0, (-1, groups)).flatten(1, 2)
    scores = torch.bmm(key, (grouped * (factor / (softcap or 1.0))).transpose(1, 2))
    scores = scores.transpose(1, 2)
    if softcap is not None:
        scores = torch.tanh(scores) * softcap
    weights = torch.softmax(scores + mask, dim=-1)
    out = torch.bmm(weights, value)  # [kv heads, groups * n, dim]
    return out.unflatten(1, (groups, -1)).flatten(0, 1).unsqueeze(0).transpose(1, 2)
