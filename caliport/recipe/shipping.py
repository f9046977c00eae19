"""The part of a recipe that says what is exported."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from caliport.export.quantization.choices import Goal
from caliport.export.quantization.quantizers.registry import needs_text
from caliport.export.quantization.text import TOKENS
from caliport.export.runtime import names
from caliport.recipe import bounds
from caliport.recipe.fields import (
    Part,
    Precision,
    QuantizerName,
    Real,
    Runtime,
    Size,
    Tokens,
    Whole,
)


class Export(Part):
    """What is exported: every runtime in every precision.

    ``ship`` is ``fold`` for one artifact per composition, ``bundle`` for one artifact with all.
    ``int8_layers`` and ``embedding_bits`` apply to int4, ``cache_bits`` to executorch
    (``caliport.export.quantization.choices.Quantization``). ``quantizer`` finds the integers of
    int4, on ``calibration_tokens`` of the compositions' own training examples if it needs text. By
    default it is gptq, but hqq for a method that was trained through int4, since those corrections
    make up for the errors of hqq. ``tune_norms`` tunes the gains of
    normalizations to the integers. ``max_size`` (such as ``95MB``) or ``target_kl`` chooses further
    layers that int4 keeps at 8 bits (``caliport.export.quantization.choices.Goal``).
    """

    method: str = "best"
    ship: tuple[Literal["fold", "bundle"], ...] = Field(("fold",), min_length=1)
    runtimes: tuple[Runtime, ...] = names()
    precisions: tuple[Precision, ...] = ("fp32", "int8", "int4")
    context: Tokens | None = None
    int8_layers: tuple[str, ...] = ()
    embedding_bits: Literal[4, 8] | None = None
    cache_bits: Literal[8] | None = None
    quantizer: QuantizerName | None = None
    calibration_tokens: Annotated[Whole, Field(ge=64, le=bounds.COUNT)] = TOKENS
    tune_norms: bool = False
    max_size: Annotated[Size, Field(gt=0, le=bounds.BYTES)] | None = None
    target_kl: Annotated[Real, Field(gt=0, le=100)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Export:
        if self.max_size is not None and self.target_kl is not None:
            raise ValueError("max_size and target_kl: expected one of them")
        if self.calibrates and self.quantizer is not None and not needs_text(self.quantizer):
            raise ValueError(
                "max_size, target_kl and tune_norms go with a quantizer that needs text"
            )
        if self.tune_norms and "bundle" in self.ship:
            raise ValueError("tune_norms goes with ship: [fold]")
        return self

    @property
    def calibrates(self) -> bool:
        """Whether int4 is fitted to what ships beyond its integers."""
        return self.goal is not None or self.tune_norms

    @property
    def goal(self) -> Goal | None:
        """What decides which layers of int4 stay at 8 bits besides ``int8_layers``."""
        if self.max_size is None and self.target_kl is None:
            return None
        return Goal(self.max_size, self.target_kl)
