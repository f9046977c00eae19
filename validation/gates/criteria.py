"""What an artifact is asked, what its answers are compared with, and how reports name it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from caliport.validation.evaluation.evaluation import Answers, Evaluation
from caliport.validation.gates.limits import Limits

METRIC = "rougeL"
"""Task metric where none is named."""


@dataclass(frozen=True)
class Criteria:
    """What an artifact is asked and compared with.

    Attributes:
        evaluation: What every model is asked.
        reference: Answers of the eager fp32 composition, or of another artifact in its place.
        base: Answers of the eager base; None where the artifact is the base itself.
        limits: Of the artifact's precision.
        metric: Task metric, where the evaluation has references.
        stock_examples: Prompts that the stock runner answers too; 0 skips it.
    """

    evaluation: Evaluation
    reference: Answers
    base: Answers | None
    limits: Limits
    metric: str = METRIC
    stock_examples: int = 4


@dataclass(frozen=True)
class Caption:
    """How reports show an artifact.

    Attributes:
        composition: Its name.
        method: What made it, such as ``lcpp``.
        notes: What is known not to be checked.
    """

    composition: str
    method: str = "adapter"
    notes: Sequence[str] = ()
