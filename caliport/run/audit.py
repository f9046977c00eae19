"""Audit adapters before anything is trained: how they overlap, what each merge does to them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.errors import InputError
from caliport.core.processes import is_main
from caliport.core.progress import progress
from caliport.run.own_task import own_task_of, own_tasks_from
from caliport.run.resolve import weights_of
from caliport.run.workspace import Workspace
from caliport.stages.stage import stage

if TYPE_CHECKING:
    from caliport.calibrate.audit import Departure, MergeAudit, ModuleAudit
    from caliport.validation.records.audit import (
        AuditedMerge,
        AuditedModule,
        CompositionAudit,
        MergeError,
    )


def audit_adapters(
    directories: Sequence[Path],
    weights: Sequence[float] | None,
    out: Path | None,
    any_base: bool = False,
    own: tuple[str, Sequence[Path]] | None = None,
) -> None:
    """Audit adapters as one composition, show the result, and write it to ``out`` if given.

    ``own`` is a base and a file of examples for each adapter: score each on its own task too.
    """
    from caliport.show.tables import show_audit
    from caliport.validation.records.reports import AUDIT, check_reports
    from caliport.validation.report.page import write_report

    if out is not None:
        check_reports(out)
    adapters = dict(zip(_names(directories), directories, strict=True))
    audit = audit_composition(adapters, weights, any_base=any_base)
    if own is not None:
        found = own_tasks_from(own[0], directories, own[1])
        audit = audit.model_copy(update={"own": dict(zip(adapters, found, strict=True))})
    title = " + ".join(adapters)
    show_audit(title, audit)
    if out is not None:
        write_audit({title: audit}, out / AUDIT)
        print(f"report: {write_report(out)}")


def audit_all(space: Workspace) -> None:
    """Audit every composition of a run for the merges in its recipe; warn of those far off.

    Each adapter is scored on its own task first, and one that barely changes it is named.
    """
    from caliport.show.tables import show_far, show_own
    from caliport.validation.records.audit import AuditReport
    from caliport.validation.records.reports import AUDIT, read_result

    recipe = space.recipe
    used = {recipe.calibration.merge or "linear", *recipe.calibration.methods}
    audits: dict[str, CompositionAudit] = {}
    used_tasks = dict.fromkeys(t for tasks in recipe.compositions.values() for t in tasks)
    own = {task: own_task_of(space, task) for task in used_tasks}
    if is_main():
        show_own({task: found for task, found in own.items() if not found.matters})
    for composition, tasks in recipe.compositions.items():
        adapters = {task: space.adapter(task) for task in tasks}
        out, weights = space.kept("audit", composition), weights_of(space, composition)

        def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
            found = audit_composition(  # called at once
                adapters,  # noqa: B023
                weights,  # noqa: B023
                used,
                recipe.calibration.any_base,
            )
            write_audit({composition: found}, partial / AUDIT)  # noqa: B023

        inputs = {f"adapter {task}": path for task, path in adapters.items()}
        key: dict[str, Any] = {"merges": sorted(used)}
        key |= {} if weights is None else {"weights": weights}
        stage(out, "audit", f"{composition}: audit", inputs, key, build)
        (read,) = read_result(AuditReport, out / AUDIT).compositions.values()
        audits[composition] = read.model_copy(update={"own": {task: own[task] for task in tasks}})
        if is_main():
            show_far(composition, audits[composition])
    if is_main():
        write_audit(audits, space.reports / AUDIT)


def audit_composition(
    adapters: Mapping[str, Path],
    weights: Sequence[float] | None = None,
    merges: Collection[str] | None = None,
    any_base: bool = False,
) -> CompositionAudit:
    """Audit the adapters of one composition and every merge of them.

    Args:
        adapters: PEFT LoRA directories by the name to show.
        weights: One per adapter, in the same order; default 1/N each.
        merges: Names of the merges to audit; other names are ignored; default all merges that need
            no data.
        any_base: The adapters may name different bases, if their shapes are equal.

    Raises:
        InputError: Fewer than two adapters, one that cannot be read, adapters of different
            bases, or not one finite weight per adapter.
    """
    from caliport.calibrate import read_peft
    from caliport.calibrate.audit import audit_merge, audit_module, check_one_base, norm_of
    from caliport.calibrate.bases import check_same_base
    from caliport.calibrate.merges.exact import exact
    from caliport.calibrate.merges.registry import MERGES
    from caliport.validation.records.audit import CompositionAudit

    used = _weights(len(adapters), weights)
    updates = {name: read_peft(path) for name, path in adapters.items()}
    if not any_base:
        check_same_base(list(adapters.values()))
    check_one_base(updates)
    parts = list(updates.values())
    wanted = exact(parts, used)
    names = sorted(wanted.modules, key=_natural)
    modules: list[ModuleAudit] = []
    chosen = [MERGES[name] for name in MERGES if merges is None or name in merges]
    audited: list[MergeAudit] = []
    with progress("auditing", len(names) + len(chosen)) as advance:
        for name in names:
            advance(len(modules), name)
            modules.append(audit_module(parts, name))
        for merge in chosen:
            advance(len(modules) + len(audited), f"{merge.name} merge")
            audited.append(audit_merge(parts, used, wanted, merge))
    return CompositionAudit(
        weights=dict(zip(adapters, used, strict=True)),
        modules=[_module(m, list(adapters), norm_of(wanted, m.name), audited) for m in modules],
        merges=[_merge(m) for m in audited],
    )


def write_audit(audits: Mapping[str, CompositionAudit], path: Path) -> None:
    """Write ``audit.json``: all compositions of a run by name."""
    from caliport.validation.records.audit import AuditReport
    from caliport.validation.records.reports import environment, this_machine, write_result

    report = AuditReport(machine=this_machine(), versions=environment(), compositions=dict(audits))
    write_result(report, path)


def _names(directories: Sequence[Path]) -> list[str]:
    """Each directory's name; equal names are numbered by position."""
    names = [directory.resolve().name for directory in directories]
    return [
        name if names.count(name) == 1 else f"{name} ({index})"
        for index, name in enumerate(names, start=1)
    ]


def _weights(adapters: int, weights: Sequence[float] | None) -> list[float]:
    from caliport.calibrate.merges.common import check_weight

    if not weights:
        return [1 / max(adapters, 1)] * adapters
    if len(weights) != adapters:
        raise InputError(f"{len(weights)} weights for {adapters} adapters; expected one each")
    for weight in weights:
        check_weight(weight, "a weight")
    return list(weights)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in name.split(".")]


def _module(
    found: ModuleAudit,
    adapters: Sequence[str],
    sum_norm: float,
    merges: Sequence[MergeAudit],
) -> AuditedModule:
    from caliport.validation.records.audit import (
        AdapterPart,
        AngleCosines,
        AuditedModule,
        PairOverlap,
    )

    layer = re.search(r"\.(\d+)\.", found.name)
    return AuditedModule(
        name=found.name,
        layer=int(layer[1]) if layer else None,
        component=found.name.rpartition(".")[2],
        shape=found.shape,
        sum_norm=sum_norm,
        adapters={
            name: AdapterPart(**asdict(part))
            for name, part in zip(adapters, found.parts, strict=True)
            if part is not None
        },
        overlaps=[
            PairOverlap(
                first=adapters[pair.first],
                second=adapters[pair.second],
                cosine=pair.cosine,
                columns=AngleCosines(**asdict(pair.columns)),
                rows=AngleCosines(**asdict(pair.rows)),
            )
            for pair in found.overlaps
        ],
        merges={
            merge.merge: _error(merge.departures[found.name])
            for merge in merges
            if merge.refused is None
        },
    )


def _error(found: Departure) -> MergeError:
    from caliport.validation.records.audit import MergeError

    return MergeError(error=found.error, residual=found.residual, kept=found.kept)


def _merge(found: MergeAudit) -> AuditedMerge:
    from caliport.validation.records.audit import AuditedMerge

    total = found.total
    return AuditedMerge(
        merge=found.merge,
        verdict=found.verdict,
        error=total.error,
        kept=total.kept,
        text=found.text,
    )
