"""Checks on a decoder's attention, masks and caches while it is traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from caliport.core.errors import InputError


def check_attention(options: Mapping[str, Any], runtime: str) -> None:
    """Check that a model uses plain softmax attention.

    Args:
        options: Keyword arguments of its attention function, without mask, ``scaling`` and
            ``softcap``.
        runtime: Named in the message.

    Raises:
        InputError: Attention sinks, attention to later tokens, or some other tensor that the
            kernels would ignore.
    """
    odd = [
        name
        for name, value in options.items()
        if isinstance(value, Tensor) and name not in ("position_ids", "cache_position")
    ]
    if options.get("is_causal") is False:
        odd.append("is_causal false")
    if odd:
        raise InputError(
            f"config.json: attention with {odd[0]} cannot be exported to {runtime}; "
            "expected plain softmax attention"
        )


class TracedLayer(Protocol):
    """One layer's cache during tracing, with what the decoders of both runtimes record.

    Attributes:
        given: The keys and values that the cache returned to its layer; None before its first use.
        attended: Whether they reached the attention function.
    """

    given: tuple[Tensor, Tensor] | None
    attended: bool


LayerT = TypeVar("LayerT", bound=TracedLayer)


def attended(layers: Sequence[LayerT], key: Tensor, value: Tensor) -> tuple[int, LayerT]:
    """Find the layer whose cache returned these keys and values, and mark it as attended.

    Returns:
        Its index and the layer's cache.

    Raises:
        InputError: No cache returned them: the model changed them before attention.
    """
    for index, layer in enumerate(layers):
        if layer.given is not None and layer.given[0] is key and layer.given[1] is value:
            layer.attended = True
            return index, layer
    raise InputError(
        "config.json: the model changes keys or values after they are cached, which cannot be "
        "exported; expected attention to what is cached"
    )


def check_attended(layers: Sequence[TracedLayer]) -> None:
    """Check that each of ``config.num_hidden_layers`` caches was attended to.

    Raises:
        InputError: A layer does not attend to its cache.
    """
    idle = [index for index, layer in enumerate(layers) if not layer.attended]
    if idle:
        raise InputError(
            f"config.json: layer {idle[0]} does not attend to a cache of its own; expected "
            "attention in every layer"
        )


def check_cache(layer: int, new: tuple[Tensor, Tensor], heads: int, dim: int) -> None:
    """Check the new keys and values of a layer against the size of its cache.

    Args:
        layer: Named in the message.
        new: Keys and values, [1, heads, n, dim] each.
        heads: Key-value heads of the cache.
        dim: Size of a head of the cache.

    Raises:
        InputError: The number of heads or the head size differs.
    """
    for states in new:
        found = (int(states.shape[1]), int(states.shape[3]))
        if found != (heads, dim):
            raise InputError(
                f"config.json: layer {layer} has {found[0]} key-value heads of {found[1]}, "
                f"expected num_key_value_heads x head_dim, {heads} of {dim}"
            )


def window_of(options: Mapping[str, Any]) -> int | None:
    """The window of the attention mask that a model requests.

    Args:
        options: What ``transformers.masking_utils`` passes to the function that makes a mask.

    Returns:
        Number of keys that a token sees, including its own; None for all earlier ones.

    Raises:
        InputError: The mask is neither causal nor causal with a window.
    """
    if not options.get("allow_is_causal_skip", False):
        raise InputError(
            f"config.json: model_type {options['config'].model_type} has an attention mask of its "
            "own, which cannot be exported; expected causal attention, with or without a window"
        )
    return options.get("local_size")
