"""Modules of an audit grouped by layer or by component, for tables and plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from caliport.validation.records.audit import AngleCosines, AuditedModule, CompositionAudit

K = TypeVar("K")


@dataclass(frozen=True)
class AdapterMeans:
    """Means over modules of one adapter's norm and ranks."""

    norm: float
    rank: float
    numerical_rank: float
    effective_rank: float


@dataclass(frozen=True)
class Summary:
    """Several modules as one.

    Attributes:
        modules: Their number.
        adapters: Of those that target any of the modules.
        cosine: Mean over modules and pairs of adapters; None where no pair overlaps.
        columns, rows: Likewise, ``highest`` the highest of all.
        errors: By merge, √Σ‖M − S‖² / √Σ‖S‖² over the modules; None where the sum is zero.
    """

    modules: int
    adapters: dict[str, AdapterMeans]
    cosine: float | None
    columns: AngleCosines | None
    rows: AngleCosines | None
    errors: dict[str, float | None]


def summaries(audit: CompositionAudit, by: Callable[[AuditedModule], K]) -> dict[K, Summary]:
    """One summary for each value of ``by``, in the order of the modules."""
    groups: dict[K, list[AuditedModule]] = {}
    for module in audit.modules:
        groups.setdefault(by(module), []).append(module)
    return {key: summary(audit, modules) for key, modules in groups.items()}


def summary(audit: CompositionAudit, modules: Sequence[AuditedModule]) -> Summary:
    """Some modules of an audit as one."""
    adapters = {}
    for name in audit.weights:
        parts = [m.adapters[name] for m in modules if name in m.adapters]
        if parts:
            adapters[name] = AdapterMeans(
                fmean(p.norm for p in parts),
                fmean(p.rank for p in parts),
                fmean(p.numerical_rank for p in parts),
                fmean(p.effective_rank for p in parts),
            )
    pairs = [pair for module in modules for pair in module.overlaps]
    return Summary(
        modules=len(modules),
        adapters=adapters,
        cosine=fmean(pair.cosine for pair in pairs) if pairs else None,
        columns=_angles(pair.columns for pair in pairs),
        rows=_angles(pair.rows for pair in pairs),
        errors={name: _error(modules, name) for name in applied(audit)},
    )


def applied(audit: CompositionAudit) -> list[str]:
    """The merges that apply to these adapters."""
    return [merge.merge for merge in audit.merges if merge.verdict != "does not apply"]


def shown(error: float | None) -> str:
    """An error in a table: 0.98, 0 for what is only rounding, a dash where there is none."""
    if error is None:
        return "–"
    if error < 1e-5:
        return "0"
    return f"{error:.2f}" if error >= 0.005 else f"{error:.0e}"


def shown_cosine(value: float | None) -> str:
    """A cosine in a table, with a minus sign where two decimals leave one, or a dash."""
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def _angles(found: Iterable[AngleCosines]) -> AngleCosines | None:
    cosines = list(found)
    if not cosines:
        return None
    return AngleCosines(
        mean=fmean(c.mean for c in cosines),
        highest=max(c.highest for c in cosines),
        chance=fmean(c.chance for c in cosines),
    )


def _error(modules: Sequence[AuditedModule], merge: str) -> float | None:
    whole = math.hypot(*(m.sum_norm for m in modules))
    return math.hypot(*(m.merges[merge].residual for m in modules)) / whole if whole else None
