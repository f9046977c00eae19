"""Memory and time of an export to ONNX, measured on two cores of an AMD EPYC."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from caliport.core.checkpoints import longest_context
from caliport.export.decoder.parts import cache_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from caliport.export.decoder.parts import Part
    from caliport.export.quantization.choices import Form


class OnnxCosts:
    """See ``caliport.export.runtime.Costs``."""

    lowering = 0.63e9
    start = 12.0
    layer = 0.1
    keeps_terms = False

    def shipped(self, part: Part) -> int:
        """Bytes in the layout of the operators; a tied table in the same layout counts once."""
        if part.form is not None:
            return _in_nodes(part, part.form)
        return 0 if part.is_tied else part.data()

    def graph(self, model: PreTrainedModel, context: int | None) -> int:
        """Bytes of the sines and cosines, float32 [context, turned / 2] each."""
        config = model.config.get_text_config()
        length = context or longest_context(config)
        _, dim = cache_shape(config)
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = [kind for kind in rope.values() if isinstance(kind, Mapping)] or [rope]
        return sum(int(4 * length * dim * kind.get("partial_rotary_factor", 1.0)) for kind in kinds)

    def copied(self, parts: Sequence[Part], precision: str) -> float:
        """Bytes of the largest matrix, since matrices are written one by one."""
        return float(max(self.shipped(part) for part in parts))

    def methods(self, compositions: int) -> int:
        """One: a single graph serves all compositions."""
        return 1

    def term_bytes(self, precision: str) -> tuple[int, int]:
        """Always float32."""
        return (4, 4)


def _in_nodes(part: Part, form: Form) -> int:
    from caliport.export.onnx.graph.layouts import lookup_layout, product_layout

    rows, columns = part.shape
    product = product_layout(rows, columns, "int8" if form.endswith("int8") else "int4")
    layout = product
    if part.is_lookup:
        layout = lookup_layout(rows, columns, form, product if part.is_tied else None)
    size = math.prod(layout.data_shape) + 4 * math.prod(layout.scale_shape)
    if part.is_tied and layout.scale_shape == product.scale_shape:
        return 0 if math.prod(product.data_shape) == math.prod(layout.data_shape) else size
    return size
