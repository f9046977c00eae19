"""What can be exported, checked before any work; and how a model is changed while it is traced."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor

from caliport_core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_ATTENTION = "caliport"
_KINDS = ("full_attention", "sliding_attention", "chunked_attention")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# What makes the keys and values of layers differ from num_key_value_heads of head_dim each.
_OTHER_CACHES = ("kv_lora_rank", "num_kv_shared_layers", "is_heterogeneous")
# Rotary embeddings that depend on the length of the text, each with the field that says up to
# which length they are those of a short one.
_SHORT_TEXTS = {
    "longrope": "original_max_position_embeddings",
    "dynamic": "max_position_embeddings",
}


def check_exportable(model: PreTrainedModel, context: int) -> None:
    """Check what can be known before any work.

    Args:
        model: A causal language model as ``transformers`` builds it.
        context: Length of the key-value cache in tokens.

    Raises:
        InputError: One line that names the field of ``config.json`` or the model class, what was
            found and what would be right, for: encoder-decoders and models of more than text;
            mixtures of experts; layers that are not attention over all earlier tokens or a window
            of them; attention that transformers does not let us replace, that looks ahead, that
            has sinks, or whose cache is not the same in every layer; a ``forward`` without
            positions, or positions that do not begin at 0; rotary embeddings that change within
            ``context``; ``context`` out of the model's range.
    """
    config = model.config.get_text_config()
    _check_decoder(model)
    _check_layers(model, config, context)
    _check_interface(model)
    _check_rotary(config, context)
    longest = getattr(config, "max_position_embeddings", None)
    if context < 1 or (longest is not None and context > longest):
        raise InputError(f"context: found {context}, expected 1 to the model's {longest} positions")


def _check_decoder(model: PreTrainedModel) -> None:
    config = model.config
    if config.is_encoder_decoder:
        raise InputError("config.json: is_encoder_decoder is true, expected a decoder alone")
    more = sorted(config.sub_configs)
    if getattr(config, "cross_attention_layers", None):
        more.append("cross_attention_layers")
    if more:
        raise InputError(
            f"config.json: model_type {config.model_type} has {', '.join(more)}; expected a "
            "text-only decoder"
        )
    parts_of_names = (set(name.split(".")) for name, _ in model.named_modules())
    if any(parts & {"experts", "router", "block_sparse_moe"} for parts in parts_of_names):
        fields = [f"{name} {getattr(config, name)}" for name in _EXPERTS if hasattr(config, name)]
        found = fields[0] if fields else f"model_type {config.model_type}"
        raise InputError(
            f"config.json: {found}: a mixture of experts cannot be exported; expected a dense model"
        )


def _check_layers(model: PreTrainedModel, config: PreTrainedConfig, context: int) -> None:
    kinds = set(getattr(config, "layer_types", None) or ())
    odd = sorted(kinds - set(_KINDS))
    if odd:
        raise InputError(
            f"config.json: layer_types has {', '.join(odd)}, expected full_attention or "
            "sliding_attention"
        )
    chunk = getattr(config, "attention_chunk_size", None)
    if "chunked_attention" in kinds and (chunk is None or chunk < context):
        raise InputError(
            f"context: found {context}, expected at most config.json's attention_chunk_size of "
            f"{chunk}, since layer_types has chunked_attention"
        )
    if model._is_stateful:
        raise InputError(
            f"config.json: model_type {config.model_type} has layers that keep a state other than "
            "keys and values; expected attention layers only"
        )
    for name in _OTHER_CACHES:
        if getattr(config, name, None):
            raise InputError(
                f"config.json: {name} is {getattr(config, name)}: layers with caches of other "
                "sizes than num_key_value_heads x head_dim cannot be exported; expected none"
            )
    modules = [module for module in model.modules() if hasattr(module, "layer_idx")]
    if getattr(config, "use_bidirectional_attention", None) or not all(
        getattr(module, "is_causal", True) for module in modules
    ):
        raise InputError(
            f"config.json: model_type {config.model_type} attends to later tokens "
            "(use_bidirectional_attention, is_causal or is_decoder); expected causal attention"
        )
    sinks = [name for name, _ in model.named_parameters() if name.split(".")[-1] == "sinks"]
    if sinks:
        raise InputError(
            f"config.json: model_type {config.model_type} has attention sinks ({sinks[0]}), which "
            "cannot be exported; expected plain softmax attention"
        )


def _check_interface(model: PreTrainedModel) -> None:
    """Models whose attention and positions can be ours.

    Without positions of ours, a model would count from 0 in every step. Those that number them by
    the padding token, as RoBERTa does, would look up others than they were trained with.
    """
    takes = inspect.signature(model.forward).parameters
    for name in ("position_ids", "logits_to_keep"):
        if name not in takes:
            raise InputError(
                f"{type(model).__name__}: its forward takes no {name}; this architecture cannot be "
                "exported"
            )
    if any(hasattr(m, "create_position_ids_from_input_ids") for m in model.modules()):
        raise InputError(
            f"config.json: model_type {model.config.model_type} counts positions from "
            "pad_token_id + 1; expected positions from 0"
        )
    if not model._can_set_attn_implementation():
        raise InputError(
            f"{type(model).__name__}: its attention is code of its own; expected one that "
            "transformers lets other attention functions replace"
        )


def _check_rotary(config: PreTrainedConfig, context: int) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [kind for kind in rope.values() if isinstance(kind, Mapping)]
    for parameters in nested or [rope]:
        kind = parameters.get("rope_type", "default")
        field = _SHORT_TEXTS.get(kind)
        if field is None:
            continue
        most = parameters.get(field) or getattr(config, field)
        if context > most:
            raise InputError(
                f"context: found {context}, expected at most config.json's {field} of {most}: "
                f"beyond it, the rotary embeddings of rope_type {kind} depend on the length of "
                "the text"
            )


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


@contextmanager
def tracing(
    model: PreTrainedModel, attention: Callable[..., Any], mask: Callable[..., Any]
) -> Iterator[None]:
    """Let a model attend through a function of ours, its rotary embeddings fixed.

    Args:
        model: Left as it was.
        attention: As ``transformers.AttentionInterface`` has them.
        mask: As ``transformers.AttentionMaskInterface`` has them. Called once a pass and kind of
            layer; what it returns is the attention's ``attention_mask``.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    config = model.config.get_text_config()
    before = config._attn_implementation
    AttentionInterface.register(_ATTENTION, attention)
    AttentionMaskInterface.register(_ATTENTION, mask)
    config._attn_implementation = _ATTENTION
    try:
        with ExitStack() as rotary:
            for module in model.modules():
                if hasattr(module, "rope_type"):
                    rotary.enter_context(_fixed(module))
            yield
    finally:
        config._attn_implementation = before
        AttentionInterface._global_mapping.pop(_ATTENTION)
        AttentionMaskInterface._global_mapping.pop(_ATTENTION)


@contextmanager
def _fixed(module: Any) -> Iterator[None]:
    """Hold a rotary embedding at the frequencies of short texts.

    ``transformers.modeling_rope_utils.dynamic_rope_update`` would look at the positions in every
    pass to choose them.
    """
    before = module.rope_type
    nested = before if isinstance(before, dict) else {"": before}
    after = {name: "default" if kind in _SHORT_TEXTS else kind for name, kind in nested.items()}
    kept: dict[str, Any] = {}
    for name in (name for name in nested if nested[name] != after[name]):
        prefix = f"{name}_" if name else ""
        kept[f"{prefix}inv_freq"] = getattr(module, f"{prefix}inv_freq")
        setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))
    module.rope_type = after if isinstance(before, dict) else after[""]
    try:
        yield
    finally:
        module.rope_type = before
        for name, value in kept.items():
            setattr(module, name, value)
