"""The records of a verdict: gates, and the measures that they are about."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from caliport.validation.records.agreement import agreeing, gate_trouble
from caliport.validation.records.record import (
    Count,
    Name,
    Nats,
    Perplexity,
    Record,
    Share,
    Some,
    Text,
)


class Gate(Record):
    """One verdict.

    Attributes:
        name: What is checked.
        measure: What was measured, with its unit.
        limit: The bound; see ``reason`` for its direction.
        found: What was measured; None where nothing could be.
        passed: The verdict.
        decided: False where there are too few examples to say; such a gate passes.
        stage: What lost the accuracy where the gate fails.
        reason: Why this limit, and what was found.
    """

    name: Name
    measure: Name
    limit: float
    found: float | None
    passed: bool
    decided: bool = True
    stage: Name
    reason: Text

    @model_validator(mode="after")
    def _fits(self) -> Self:
        return agreeing(self, gate_trouble(self))


class AdapterEffect(Record):
    """KL in nats that tell whether the adapter is in the artifact.

    Attributes:
        kl_base: KL(base || artifact).
        kl_composition: KL(fp32 composition || artifact).
        effect: KL(base || fp32 composition).
    """

    kl_base: Nats
    kl_composition: Nats
    effect: Nats


class StockResult(Record):
    """How many texts the runtime's own runner wrote as ours did."""

    runner: Name
    matches: Count
    examples: Count

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.matches > self.examples:
            raise ValueError(f"{self.matches} matches of {self.examples} examples")
        return self


class Measures(Record):
    """How far the logits of a model are from a reference's, over all compared positions.

    Attributes:
        positions: Number of positions compared.
        max_abs: Largest absolute difference of two logits.
        kl: Mean KL(reference || model) of the next-token distributions, in nats.
        top1: Share of positions where both put the same token first, in [0, 1].
        perplexity: Of the target tokens under the model.
        reference_perplexity: Of the same tokens under the reference.
    """

    positions: Some
    max_abs: Nats
    kl: Nats
    top1: Share
    perplexity: Perplexity
    reference_perplexity: Perplexity
