"""Make an eager model round keys, values and queries as an int8 cache does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from caliport.export.quantization.cache import rounded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_REFERENCE = "caliport_int8_cache"


def round_cache(model: PreTrainedModel) -> PreTrainedModel:
    """Make an eager model round keys, values and queries as an int8 cache does.

    Args:
        model: Changed in place.

    Returns:
        ``model``.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa, mask = ALL_ATTENTION_FUNCTIONS["sdpa"], AttentionMaskInterface()["sdpa"]

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        return sdpa(module, _near(query), _near(key), _near(value), *args, **kwargs)

    AttentionInterface.register(_REFERENCE, attend)
    AttentionMaskInterface.register(_REFERENCE, mask)
    model.config.get_text_config()._attn_implementation = _REFERENCE
    return model


def _near(values: Tensor) -> Tensor:
    data, scale, zero = rounded(values)
    return (data.float() - zero.float()) * scale
