"""Memory and time of an export to ExecuTorch, measured on two cores of an AMD EPYC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from caliport.export.decoder.parts import Part

COPIES = {"fp32": 2.3, "int8": 1.5, "int4": 1.5}
"""Copies of the embeddings in memory: ExecuTorch copies constants while it emits a program."""


class ExecuTorchCosts:
    """See ``caliport.export.runtime.Costs``."""

    lowering = 0.9e9
    start = 20.0
    layer = 0.5
    keeps_terms = True

    def shipped(self, part: Part) -> int:
        """Bytes of a parameter; a tied embedding shares its data only if it is quantized."""
        shared = part.is_tied and part.form is not None
        return (0 if shared else part.data()) + part.scales(4 if part.is_lookup else 2)

    def graph(self, model: PreTrainedModel, context: int | None) -> int:
        """No bytes: sines and cosines are computed at run time."""
        return 0

    def copied(self, parts: Sequence[Part], precision: str) -> float:
        """Bytes of the constants, which are the embeddings, in several copies."""
        constants = sum(part.data() + part.scales(4) for part in parts if part.is_lookup)
        return COPIES[precision] * constants

    def methods(self, compositions: int) -> int:
        """One method for the base and one for each composition."""
        return 1 + compositions

    def term_bytes(self, precision: str) -> tuple[int, int]:
        """float16 for own terms and 8 bits for shared ones; float32 beside a float base."""
        return (4, 4) if precision == "fp32" else (2, 1)
