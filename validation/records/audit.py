"""The records of ``audit.json``: what adapters have in common and how true their merges are."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from caliport.core.untrusted import shown
from caliport.validation.records.own_task import OwnTasks
from caliport.validation.records.record import (
    Amount,
    Cosine,
    Count,
    Machine,
    Name,
    Nats,
    Record,
    Text,
)


class AdapterPart(Record):
    """One adapter's update of one module: its norm ‖ΔW‖_F and its ranks.

    Attributes:
        rank: Nominal: rows of its A.
        numerical_rank: Singular values that are not rounding.
        effective_rank: Exponential of the entropy of the singular values.
    """

    norm: Nats
    rank: Count
    numerical_rank: Count
    effective_rank: Amount


class AngleCosines(Record):
    """Cosines of principal angles between two spaces; ``chance``: random spaces at most."""

    mean: Cosine
    highest: Cosine
    chance: Cosine


class PairOverlap(Record):
    """Two adapters in one module: of the flattened updates, column spaces and row spaces."""

    first: Name
    second: Name
    cosine: Cosine
    columns: AngleCosines
    rows: AngleCosines


class MergeError(Record):
    """A merge M against the weighted sum S in one module.

    Attributes:
        error: ‖M − S‖ / ‖S‖; None where the sum is zero.
        residual: ‖M − S‖.
        kept: ⟨M, S⟩ / ‖S‖², the multiple of the sum that the merge holds; None likewise.
    """

    error: Nats | None
    residual: Nats
    kept: float | None


class AuditedModule(Record):
    """One module. ``adapters`` has those that target it, ``merges`` those that apply.

    Attributes:
        layer: Its layer's index; None outside of layers.
        component: What it is within its layer, such as ``q_proj``.
        shape: (out, in).
        sum_norm: ‖Σ wᵢΔWᵢ‖.
    """

    name: Name
    layer: Count | None
    component: Name
    shape: tuple[Count, Count]
    sum_norm: Nats
    adapters: dict[Name, AdapterPart]
    overlaps: list[PairOverlap]
    merges: dict[Name, MergeError]


class AuditedMerge(Record):
    """A merge over all modules: error and kept share as in a module, and the verdict in words."""

    merge: Name
    verdict: Literal["exact", "close", "approximate", "far", "does not apply", "undefined"]
    error: Nats | None
    kept: float | None
    text: Text


class CompositionAudit(Record):
    """Adapters, their weights, what they share and do for their own tasks; how true merges are."""

    weights: dict[Name, float]
    modules: list[AuditedModule]
    merges: list[AuditedMerge]
    own: OwnTasks = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        applied = {merge.merge for merge in self.merges if merge.verdict != "does not apply"}
        for module in self.modules:
            if unknown := sorted(module.adapters.keys() - self.weights.keys()):
                raise ValueError(f"{module.name}: adapter {shown(unknown[0])} has no weight")
            if missing := sorted(applied - module.merges.keys()):
                raise ValueError(f"{module.name}: merge {shown(missing[0])} is missing")
        return self


class AuditReport(Record):
    """``audit.json``: the adapters of each composition before anything is trained."""

    machine: Machine
    versions: dict[Name, Name]
    compositions: dict[Name, CompositionAudit]
