"""``OwnTask``: what a single-task adapter does for its own task, before anything is composed."""

from __future__ import annotations

from typing import Literal

from caliport.validation.records.record import Name, Nats, Points, Record, Some

BARELY = 0.1
"""An adapter that lowers its own task's loss by less than this share barely changes it."""


class OwnTask(Record):
    """Mean loss and task metric of an adapter's own task, without and with it.

    Attributes:
        examples: Held-out examples.
        loss: In nats a token: without, with.
        metric: Which one.
        score: 0 to 100: without, with.
    """

    examples: Some
    loss: tuple[Nats, Nats]
    metric: Literal["rougeL", "chrf", "weighted_rouge"]
    score: tuple[Points, Points]

    @property
    def matters(self) -> bool:
        """Whether it lowers the loss by at least ``BARELY``."""
        return self.loss[1] <= (1 - BARELY) * self.loss[0]

    @property
    def text(self) -> str:
        """The numbers and the verdict in words."""
        (before, after), (low, high) = self.loss, self.score
        said = (
            f"loss {before:.3g} without, {after:.3g} with it, {self.metric} {low:.1f} and "
            f"{high:.1f}, on {self.examples} examples of its own task"
        )
        if self.matters:
            return said
        if after > (1 + BARELY) * before:
            return f"{said}; it makes its own task worse: was it trained with this prompt and base?"
        return f"{said}; it barely changes its own task, so a merge of it can show little"


OwnTasks = dict[Name, OwnTask]
