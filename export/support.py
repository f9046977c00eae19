"""What can be exported, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from caliport_core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_exportable(model: PreTrainedModel, context: int) -> None:
    """Check what can be known before any work.

    Raises:
        InputError: ``context`` out of the model's range; layers other than full attention within
            ``context``; rotary embeddings that change with the length of the text.
    """
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if context < 1 or (longest is not None and context > longest):
        raise InputError(f"context: found {context}, expected 1 to the model's {longest} positions")
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    odd = kinds - {"full_attention", "sliding_attention"}
    if odd:
        raise InputError(
            f"config.json: layer_types has {', '.join(sorted(odd))}, expected full_attention"
        )
    slides = "sliding_attention" in kinds or not hasattr(config, "layer_types")
    if slides and window is not None and context > window:
        raise InputError(
            f"context: found {context}, expected at most the model's sliding window of {window}"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise InputError(
            f"config.json: rope_type is {rope}, which depends on the length of the text; "
            "expected a fixed one"
        )


def check_attention(options: Mapping[str, Any], runtime: str) -> None:
    """Check what a model asks of its attention function beyond plain softmax attention.

    Raises:
        InputError: Soft-capped scores or attention sinks, which the kernels do not compute.
    """
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise InputError(
                f"config.json: attention with {name} cannot be exported to {runtime} yet; "
                "expected plain softmax attention"
            )
