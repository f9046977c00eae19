"""The quantizers by name, found by file name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from caliport.core.entries import Entries
from caliport.core.errors import InputError
from caliport.core.untrusted import shown

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
        quantize: From float32 [n, width], and what ``prepare`` gave, to data and positive scales:
            int8 [n, width] and float32 [n, 1], or two 4-bit values per byte, uint8
            [n, width / 2], and bfloat16 [n, width / 32]. Rows must not depend on one another.
            Called from several threads.
        prepare: From the moments of a layer's inputs on calibration text, the sum of x·xᵀ,
            float32 [width, width], to what ``quantize`` takes. None: it needs no text.
        description: What it does, for a help text.
    """

    bits: int
    algorithm: str
    source: str
    quantize: Callable[[Tensor, Any], tuple[Tensor, Tensor]]
    prepare: Callable[[Tensor], Any] | None = None
    description: str = ""


QUANTIZERS: Entries[Quantizer] = Entries(
    "caliport.export.quantization.quantizers",
    "QUANTIZER",
    helpers=("registry", "scales", "compiled"),
)
DEFAULTS = {8: "max-abs", 4: "hqq"}
"""The default quantizer for each number of bits, without calibration text."""
CALIBRATED = "gptq"
"""The default 4-bit quantizer where there is calibration text."""


def of_int4() -> tuple[str, ...]:
    """Names of the quantizers that find 4-bit integers."""
    return tuple(name for name in QUANTIZERS if name not in (DEFAULTS[8],))


def needs_text(name: str | None) -> bool:
    """Whether a quantizer measures on calibration text what layers are fed.

    Args:
        name: None for the default without text.

    Raises:
        InputError: There is no 4-bit quantizer of that name.
    """
    if name is None:
        return False
    if name not in of_int4():
        raise InputError(f"quantizer: found {shown(name)}, expected {' or '.join(of_int4())}")
    return QUANTIZERS[name].prepare is not None


def quantizer_of(form: Form) -> Quantizer:
    """The quantizer, without text, of a layer that ships in a form."""
    return QUANTIZERS[DEFAULTS[8 if form.endswith("int8") else 4]]
