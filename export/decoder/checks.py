"""Check whether a model can be exported, before any work."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

from caliport.core.errors import InputError
from caliport.export.decoder.patches.short_rotary import SHORT_TEXTS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_KINDS = ("full_attention", "sliding_attention", "chunked_attention")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Config fields that make a layer's cache differ from num_key_value_heads of head_dim each.
_OTHER_CACHES = ("kv_lora_rank", "num_kv_shared_layers", "is_heterogeneous")


def check_exportable(model: PreTrainedModel, context: int) -> None:
    """Check everything about a model that can be checked before any work.

    Args:
        model: A causal language model as ``transformers`` builds it.
        context: Length of the key-value cache in tokens.

    Raises:
        InputError: One line that names the field of ``config.json`` or the model class, what was
            found and what was expected, for: encoder-decoders and multimodal models; mixtures of
            experts; layers other than attention over all earlier tokens or a window of them;
            attention that transformers cannot replace, that sees later tokens, that has sinks, or
            whose cache differs between layers; a ``forward`` without positions, or positions that
            do not begin at 0; rotary embeddings that change within ``context``; ``context`` out of
            the model's range.
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
        raise InputError("config.json: is_encoder_decoder is true, expected a decoder-only model")
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
    """Check that a model accepts other attention functions and explicit positions.

    Without explicit positions, a model would count from 0 in every step. Models that count from
    the padding token, as RoBERTa does, would look up other positions than in training.
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
        field = SHORT_TEXTS.get(kind)
        if field is None:
            continue
        most = parameters.get(field) or getattr(config, field)
        if context > most:
            raise InputError(
                f"context: found {context}, expected at most config.json's {field} of {most}: "
                f"beyond it, the rotary embeddings of rope_type {kind} depend on the length of "
                "the text"
            )
