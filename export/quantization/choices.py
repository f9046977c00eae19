"""The choices of a quantization, and the group sizes that all code shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

from caliport.core.errors import InputError

PRECISIONS = ("fp32", "int8", "int4")
NORMS = "norms.safetensors"
"""Tuned gains of an artifact's normalizations, by parameter name."""


@dataclass(frozen=True)
class Quantization:
    """How a decoder is quantized.

    Attributes:
        precision: One of ``PRECISIONS``.
        int8_layers: Linear layers that ``int4`` keeps at 8 bits.
        embedding_bits: 4 or 8; None for the bits of a tied head, or 8 if the head is not tied.
        cache_bits: 8 for keys and values in int8, None for float32.
        quantizer: How the integers of ``int4`` are found, a name in
            ``caliport.export.quantization.quantizers.registry.QUANTIZERS``; None for the one that
            needs no text. Size and kernels do not depend on it.
        tune_norms: The gains of normalizations are tuned to the integers, on calibration text.
    """

    precision: str
    int8_layers: tuple[str, ...] = ()
    embedding_bits: int | None = None
    cache_bits: int | None = None
    quantizer: str | None = None
    tune_norms: bool = False

    def __post_init__(self) -> None:
        check_precision(self.precision)
        if self.cache_bits not in (None, 8):
            raise InputError(f"cache_bits: found {self.cache_bits}, expected 8 or none")
        if self.tune_norms and self.quantizer is None:
            raise InputError("tune_norms: goes with int4 and a quantizer that needs text")
        if self.quantizer is not None and self.precision != "int4":
            raise InputError(f"quantizer: goes with int4, found {self.precision}")

    def choices(self) -> dict[str, Any]:
        """The choices besides precision, for a manifest."""
        return {
            "int8_layers": list(self.int8_layers),
            "embedding_bits": self.embedding_bits,
            "cache_bits": self.cache_bits,
            **({} if self.quantizer is None else {"quantizer": self.quantizer}),
            **({"tune_norms": True} if self.tune_norms else {}),
        }

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Quantization:
        """Read the choices from an artifact's manifest."""
        choices = manifest.get("quantization", {})
        return cls(
            manifest["precision"],
            tuple(choices.get("int8_layers", ())),
            choices.get("embedding_bits"),
            choices.get("cache_bits"),
            choices.get("quantizer"),
            choices.get("tune_norms", False),
        )


@dataclass(frozen=True)
class Goal:
    """What decides how many layers of ``int4`` stay at 8 bits; one of the two.

    Attributes:
        most_bytes: Size of the whole artifact, in bytes.
        target_kl: Mean Kullback-Leibler divergence from the float model, in nats per token, on
            text that was not calibrated on; in float arithmetic on the quantized weights.
    """

    most_bytes: int | None = None
    target_kl: float | None = None

    def __post_init__(self) -> None:
        if (self.most_bytes is None) == (self.target_kl is None):
            raise InputError("goal: expected a size or a divergence, and not both")
        if self.target_kl is not None and not 0 < self.target_kl < inf:
            raise InputError(f"target KL: found {self.target_kl}, expected more than 0")
        if self.most_bytes is not None and self.most_bytes < 1:
            raise InputError(f"most bytes: found {self.most_bytes}, expected 1 or more")


_BLOCKS = (256, 128, 64, 32)


def row_scale_block(columns: int) -> int:
    """Block size of a product whose weight has one scale per output channel.

    The scale is repeated for every block. The block is the one that takes the fewest bytes with
    padding and repeated scales; among equals, the largest.
    """
    return min(_BLOCKS, key=lambda block: -(-columns // block) * (block + 4))


GROUP_SIZE = 32


Form = Literal["int8", "int4", "rows int8", "rows int4"]


def check_precision(precision: str) -> None:
    """Raise ``InputError`` unless a precision is one of ``PRECISIONS``."""
    if precision not in PRECISIONS:
        raise InputError(f"precision: found {precision!r}, expected one of {', '.join(PRECISIONS)}")
