"""The parameters of a decoder as they ship, counted before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from caliport.export.quantization.choices import GROUP_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from caliport.export.quantization.choices import Form


@dataclass(frozen=True)
class Part:
    """A parameter as it ships.

    Attributes:
        shape: Its shape; [out, in] for a linear layer, [rows, length] for an embedding.
        form: How it is quantized; None for float32.
        is_lookup: Whether it is an embedding.
        is_tied: Whether it is an embedding with exactly the head's stored numbers.
    """

    shape: tuple[int, ...]
    form: Form | None
    is_lookup: bool = False
    is_tied: bool = False

    @property
    def values(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def stored(self) -> int:
        """Bytes of its files while the program is made (``caliport.export.decoder.stored``)."""
        return 0 if self.is_tied else self.data() + self.scales(2)

    def data(self) -> int:
        """Bytes of its integers or floats."""
        bits = 32 if self.form is None else 8 if self.form.endswith("int8") else 4
        return self.values * bits // 8

    def scales(self, size: int) -> int:
        """Bytes of its scales: ``size`` for each scale of a group, 4 for each scale of a row."""
        if self.form is None:
            return 0
        return 4 * self.shape[0] if self.form.endswith("int8") else size * self.values // GROUP_SIZE


def parts_of(model: PreTrainedModel, forms: Mapping[str, Form]) -> list[Part]:
    """All parameters of a decoder; a tied embedding is listed in addition to its head."""
    from torch import nn

    heads = {id(m.weight): n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = []
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            form = forms.get(name) if key == "weight" else None
            lookup = isinstance(module, nn.Embedding)
            head = heads.get(id(parameter)) if lookup else None
            same = head is not None and (form or "").removeprefix("rows ") == forms.get(head, "")
            found.append(Part(tuple(parameter.shape), form, lookup, same))
    return found


def cache_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Number of key-value heads and size of a head; configs may leave them implicit."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(heads), int(size)
