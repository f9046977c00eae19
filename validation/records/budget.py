"""The records of an error budget: accuracy at each stage from the adapters to the artifact."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from caliport.validation.records.gate import Measures
from caliport.validation.records.record import Name, Nats, Perplexity, Points, Record, Text

StageName = Literal["exact sum", "merge", "calibration", "quantized eager", "artifact", "device"]


class BudgetStage(Record):
    """One stage's answers to the prompts of a composition, measured.

    The exact sum is the base with the unmerged sum of the single-task adapters, in fp32; the merge
    is the method's without its correction; calibration is the composed adapter that ships. These
    three are shared by all artifacts of a composition; each form of the artifact then has its own
    quantized eager model, artifact and maybe device.

    Attributes:
        stage: Which one.
        label: For people, such as ``linear merge`` or ``int4, as ONNX Runtime rounds``.
        form: Of the artifact that it belongs to, such as ``onnx-int4`` or ``onnx-int4-bundle``;
            empty for a stage that all share.
        previous: Against the stage before; None for the first.
        first: Against the first stage of the budget; None for the first itself.
        perplexity: Of the target tokens.
        task: Mean of the task metric, 0 to 100; None without references or where the stage wrote
            no text.
        by_position: KL in nats against the stage before, mean over prompts, at each position of
            the answer; empty for the first.
        by_layer: Distance of the residual stream from that of the stage before, relative to its
            norm, mean over positions, after the embedding and after each layer; empty unless asked
            for, and for a stage whose layers cannot be read.
    """

    stage: StageName
    label: Text
    form: Name = ""
    previous: Measures | None = None
    first: Measures | None = None
    perplexity: Perplexity
    task: Points | None = None
    by_position: tuple[Nats, ...] = ()
    by_layer: tuple[Nats, ...] = ()


class Budget(Record):
    """The stages of one composition, shared ones first, then those of each form in their order.

    Attributes:
        composition: Its name.
        metric: Of ``task``; None without references.
        stages: At least two.
    """

    composition: Name
    metric: Name | None
    stages: tuple[BudgetStage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_a_start(self) -> Self:
        if self.stages[0].form:
            raise ValueError("expected a first stage that all forms share")
        return self
