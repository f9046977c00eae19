"""The fields ``calibration`` and ``train`` of a recipe: how is merged, corrected and trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from caliport.core.errors import InputError
from caliport.core.untrusted import number, shown
from caliport.recipe import bounds
from caliport.recipe.fields import (
    Count,
    DoraForm,
    MergeName,
    MethodName,
    Part,
    Rate,
    Real,
    Text,
    Whole,
)
from caliport.recipe.methods import Method

SEARCH = "search"
"""In the place of weights: choose them by the loss on held-out examples."""


def _weights(value: Any) -> float | dict[str, float] | str | None:
    if value is None or value == SEARCH:
        return SEARCH if value == SEARCH else None
    try:
        if isinstance(value, dict):
            return {str(task): _weight(one) for task, one in value.items()}
        return _weight(value)
    except InputError as error:
        raise ValueError(str(error)) from None


def _weight(value: Any) -> float:
    if isinstance(value, str):
        raise InputError(f"found {shown(value)}, expected a number, {SEARCH}, or one for each task")
    return float(number(value, "a weight", -bounds.WEIGHT, bounds.WEIGHT))


Weights = Annotated[float | dict[str, float] | str | None, PlainValidator(_weights)]


class Train(Part):
    """Settings of one training: see ``caliport.calibrate.training.loop.TrainSettings``.

    If there are several learning rates, each is tried and the one with the lowest loss on
    ``calibration.tuning`` examples is kept.
    """

    steps: Count
    batch_size: Count = 32
    learning_rate: Rate | Annotated[tuple[Rate, ...], Field(min_length=1, max_length=100)] = 5e-4
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = "cosine"
    warmup: Real = Field(0.05, ge=0, le=1)
    prompt_loss: bool = False

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to try."""
        rate = self.learning_rate
        return rate if isinstance(rate, tuple) else (rate,)


class Calibration(Part):
    """How adapters are merged, and how corrections and the joint expert are trained.

    ``merge`` is the merge under a correction, by default ``linear``, or ``exact`` for adapters of
    different ranks or modules. ``weights`` are those of the adapters in merges, also under a
    correction: one number for all, one for each task, or ``search``, which tries 0.5 and 1 for each
    and keeps the combination of lowest loss on ``tuning`` examples; by default 1/N. Column scales
    and CAT begin there. ``target_modules`` are last names of layers that a correction reaches
    besides those of the adapters.

    ``dora`` is ``svd`` or ``svd=RANK``: adapters with DoRA, which is no low-rank update, are
    replaced by the nearest one of twice their rank, or of this rank. ``any_base`` composes adapters
    that name different bases too, if their shapes fit this one.
    """

    examples: Count = 10_000
    tuning: Whole = Field(0, ge=0, le=bounds.COUNT)
    merge: MergeName | None = None
    weights: Weights = None
    target_modules: Annotated[tuple[Text, ...], Field(max_length=100)] = ()
    density: Real = Field(0.5, gt=0, le=1)
    dora: DoraForm | None = None
    any_base: bool = False
    methods: tuple[MethodName, ...] = (
        "zero-shot",
        "lora",
        "linear",
        "exact",
        "lc",
        "lc++",
        "joint",
        "multi-step",
    )
    lc: Train = Train(steps=300, learning_rate=5e-3)
    lcpp: Train = Field(Train(steps=300, learning_rate=5e-3), alias="lc++")
    scales: Train = Train(steps=300, learning_rate=5e-3)
    cat: Train = Train(steps=300, learning_rate=5e-3)
    joint: Train = Train(steps=300, learning_rate=1e-3)
    overrides: dict[MethodName, Train] = Field(default_factory=dict)

    def training(self, method: Method) -> Train:
        """How a method is trained: its entry in ``overrides``, or else its kind's field.

        A correction without its own field uses the common default.
        """
        kinds = {"lc": self.lc, "lc++": self.lcpp, "scales": self.scales, "joint": self.joint}
        kinds["cat"] = self.cat
        default = Train(steps=300, learning_rate=5e-3)
        return self.overrides.get(method.name) or kinds.get(method.kind, default)
