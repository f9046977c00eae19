"""The quantizers by name, found by file name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from caliport.core.entries import Entries

if TYPE_CHECKING:
    from torch import Tensor

    from caliport.export.quantization.choices import Form


@dataclass(frozen=True)
class Quantizer:
    """How the integers of a weight are found; its size and kernels stay the same.

    Attributes:
        bits: 8 for one scale per row, or 4 for one bfloat16 scale per 32 values.
        algorithm: Its name in a manifest.
        source: Paper or specification.
        quantize: From float32 [n, width] to data and positive scales: int8 [n, width] and float32
            [n, 1], or two 4-bit values per byte, uint8 [n, width / 2], and bfloat16
            [n, width / 32]. Rows must not depend on one another. Called from several threads.
    """

    bits: int
    algorithm: str
    source: str
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]


QUANTIZERS: Entries[Quantizer] = Entries(
    "caliport.export.quantization.quantizers", "QUANTIZER", helpers=("registry",)
)
DEFAULTS = {8: "max-abs", 4: "hqq"}
"""The default quantizer for each number of bits."""


def quantizer_of(form: Form) -> Quantizer:
    """The quantizer of a layer that ships in a form."""
    return QUANTIZERS[DEFAULTS[8 if form.endswith("int8") else 4]]
