"""Values of a base's ``config.json`` and ``generation_config.json``, checked before use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caliport.core.errors import InputError
from caliport.core.untrusted import mapping, number, shown

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads")
_WIDTHS = (
    *("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "head_dim"),
    *("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "d_kv"),
)
_LENGTHS = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"),
    *("sliding_window", "attention_chunk_size", "original_max_position_embeddings"),
)
_WHOLE = {
    **dict.fromkeys(_LAYERS, (1, 1000)),
    **dict.fromkeys(_HEADS, (1, 2**16)),
    **dict.fromkeys(_WIDTHS, (1, 2**20)),
    **dict.fromkeys(_LENGTHS, (0, 2**27)),
    "vocab_size": (1, 2**24),
}
_SMALL = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
_REAL = {
    **dict.fromkeys(_SMALL, (0, 1)),
    "rope_theta": (1e-3, 1e15),
    "rope_local_base_freq": (1e-3, 1e15),
    "partial_rotary_factor": (0, 1),
    "factor": (1e-6, 1e9),
}
_FLAGS = ("tie_word_embeddings", "is_encoder_decoder", "attention_bias", "mlp_bias")
_NESTED = ("text_config", "rope_parameters", "rope_scaling")
# Settings by which transformers reads other files than those checked here, or changes its classes.
_ELSEWHERE = ("transformers_weights", "configuration_files", "fusion_config")
_KERNELS = ("attn_implementation", "experts_implementation")
_IDS = 2**31 - 1


def check_settings(settings: Mapping[str, Any], where: Path) -> None:
    """Check the sizes, numbers and end tokens of a ``config.json``.

    Args:
        settings: Its content.
        where: The file, for messages.

    Raises:
        InputError: A value of another type or beyond reason, an end token that is none of the
            vocabulary, or a setting that leads to other files or to code.
    """
    _check_part(settings, str(where), 0)
    for name in _ELSEWHERE:
        if settings.get(name) is not None:
            raise InputError(
                f"{where}: {name} is {shown(settings[name])}, which is not supported; remove it"
            )
    for name in _KERNELS:
        for key in (name, f"_{name}", f"_{name}_internal"):
            value = settings.get(key)
            chosen = value.values() if isinstance(value, dict) else [value]
            if any(one is not None and not str(one).isidentifier() for one in chosen):
                raise InputError(
                    f"{where}: {key} is {shown(value)}, expected a kernel of transformers; none is "
                    "fetched"
                )
    if "auto_map" in settings:
        mapping(settings["auto_map"], f"{where}: auto_map")
    check_ends(settings, settings, where)


def check_ends(found: Mapping[str, Any], settings: Mapping[str, Any], where: Path) -> None:
    """Check that the end tokens of a settings file are token ids of the model.

    Args:
        found: The file's content.
        settings: The content of ``config.json``, for the size of the vocabulary.
        where: The file, for messages.

    Raises:
        InputError: Something other than an id or a list of ids, or an id beyond the vocabulary.
    """
    sizes = [part.get("vocab_size") for part in _parts(settings)]
    rows = next((size for size in sizes if size is not None), _IDS + 1)
    for part in _parts(found):
        value = part.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if len(ids) > 4096:
            raise InputError(f"{where}: eos_token_id has {len(ids):,} ids, expected at most 4096")
        for one in ids:
            number(one, f"{where}: eos_token_id", 0, rows - 1, whole=True)
        for name in ("bos_token_id", "pad_token_id"):
            one = part.get(name)
            if one is not None and not isinstance(one, list):
                number(one, f"{where}: {name}", -1, _IDS, whole=True)


def _parts(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    text = settings.get("text_config")
    return [settings, text] if isinstance(text, dict) else [settings]


def _check_part(part: Mapping[str, Any], where: str, depth: int) -> None:
    for name, (low, high) in _WHOLE.items():
        if part.get(name) is not None:
            _each(part[name], f"{where}: {name}", low, high, whole=True)
    for name, (least, most) in _REAL.items():
        if part.get(name) is not None:
            number(part[name], f"{where}: {name}", least, most)
    for name in _FLAGS:
        if not isinstance(part.get(name), bool | None):
            raise InputError(f"{where}: {name} is {shown(part[name])}, expected true or false")
    nested = [*_NESTED, *part] if depth == 1 else _NESTED  # rope_parameters by kind of layer
    for name in nested:
        inner = part.get(name)
        if name in _NESTED and inner is not None:
            mapping(inner, f"{where}: {name}")
        if isinstance(inner, dict) and depth < 3:
            _check_part(inner, f"{where}: {name}", depth + 1)


def _each(value: object, where: str, low: int, high: int, *, whole: bool) -> None:
    """Check a number, or one for each layer."""
    for one in value if isinstance(value, list) and value else [value]:
        number(one, where, low, high, whole=whole)
