"""What a decoder asks of its attention and its caches while it is traced, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from caliport.core.errors import InputError


def check_attention(options: Mapping[str, Any], runtime: str) -> None:
    """Check what a model asks of its attention function beyond plain softmax attention.

    Args:
        options: Its keyword arguments, without mask, ``scaling`` and ``softcap``.
        runtime: Named in the message.

    Raises:
        InputError: Attention sinks, attention to later tokens, or some other tensor that the
            kernels would leave out.
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
    """One layer's cache, as both decoders have it while they are traced.

    Attributes:
        given: The keys and values that it gave to its layer; None before it was asked.
        attended: Whether attention got them.
    """

    given: tuple[Tensor, Tensor] | None
    attended: bool


LayerT = TypeVar("LayerT", bound=TracedLayer)


def attended(layers: Sequence[LayerT], key: Tensor, value: Tensor) -> tuple[int, LayerT]:
    """The layer that gave these keys and values, which attention has got.

    Returns:
        Its index and itself, marked as attended.

    Raises:
        InputError: None of them did; the model changed them in between.
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
        InputError: One was not.
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
        InputError: Other heads or another size.
    """
    for states in new:
        found = (int(states.shape[1]), int(states.shape[3]))
        if found != (heads, dim):
            raise InputError(
                f"config.json: layer {layer} has {found[0]} key-value heads of {found[1]}, "
                f"expected num_key_value_heads x head_dim, {heads} of {dim}"
            )


def window_of(options: Mapping[str, Any]) -> int | None:
    """The window of the attention mask that a model asks for.

    Args:
        options: What ``transformers.masking_utils`` gives to the function that makes a mask.

    Returns:
        Keys that a token sees, itself included; None for all up to itself.

    Raises:
        InputError: A mask of another form.
    """
    if not options.get("allow_is_causal_skip", False):
        raise InputError(
            f"config.json: model_type {options['config'].model_type} has an attention mask of its "
            "own, which cannot be exported; expected causal attention, with or without a window"
        )
    return options.get("local_size")
