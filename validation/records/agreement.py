"""Do the values of a record agree with each other? Where one of them was edited they do not.

Each function returns what is wrong in a few words, or None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isclose
from typing import TYPE_CHECKING, TypeVar

from caliport.core.errors import printable

if TYPE_CHECKING:
    from caliport.validation.records.device import DeviceResult
    from caliport.validation.records.gate import Gate, Measures
    from caliport.validation.records.reports import ArtifactResult, TaskResult

R = TypeVar("R")

_AGREEMENT = "top-1 agreement"
_AT_LEAST = (_AGREEMENT, "share of equal texts", "change, as a share", ", points")
"""How measures end whose limit is the least; of all others it is the most."""
_INTERVALS = _AT_LEAST[2:]  # of which an interval is judged, so that there may be no verdict


def agreeing(record: R, trouble: str | None) -> R:
    """The record, for a validator; raises ``ValueError`` where there is trouble."""
    if trouble is not None:
        raise ValueError(trouble)
    return record


def gate_trouble(gate: Gate) -> str | None:
    """Where a gate's verdict is not what its value and its limit give."""
    if gate.found is None:
        return "passed is true, but nothing was found" if gate.passed else None
    if not gate.decided:
        fits = (gate.passed and gate.measure.endswith(_INTERVALS)) or _of_other_prompts(gate)
        return None if fits else "decided is false, but its value and its limit decide"
    apart = gate.found - gate.limit
    within = apart >= 0 if gate.measure.endswith(_AT_LEAST) else apart <= 0
    if gate.passed == within or isclose(gate.found, gate.limit):
        return None
    if gate.passed and gate.measure == _AGREEMENT:  # so many flips as rounding makes may be more
        return None
    verdict = "true" if gate.passed else "false"
    side = "at least" if gate.measure.endswith(_AT_LEAST) else "at most"
    return f"passed is {verdict}, but {gate.found:g} was found and {side} {gate.limit:g} passes"


def _of_other_prompts(gate: Gate) -> bool:
    return gate.passed and gate.name.startswith("baseline: ")


def task_trouble(task: TaskResult) -> str | None:
    """Where the means of a task's scores are not theirs, or the difference is not that of both."""
    for name, mean, scores in (
        ("fp32", task.fp32, task.fp32_scores),
        ("artifact", task.artifact, task.artifact_scores),
    ):
        if scores and not _same(mean, sum(scores) / len(scores)):
            return f"{name} is {mean:g}, but the mean of its scores {sum(scores) / len(scores):g}"
    return _difference_trouble(task.difference, task.artifact - task.fp32, task.interval)


def _difference_trouble(said: float, found: float, interval: tuple[float, float]) -> str | None:
    if not _same(said, found):
        return f"difference is {said:g}, but the scores differ by {found:g}"
    return None if interval[0] <= interval[1] else "the interval ends before it begins"


def bytes_trouble(said: int, files: Mapping[str, int]) -> str | None:
    """Where the bytes of an artifact are not those of its files."""
    found = sum(files.values())
    return None if said == found else f"bytes is {said}, but its files have {found}"


def result_trouble(result: ArtifactResult) -> str | None:
    """Where an artifact's verdict is not that of its gates, or a gate's value not the measure's."""
    known = {
        ("prefill", "KL in nats"): _kl(result.prefill),
        ("decode", "KL in nats"): _kl(result.decode),
        ("one by one", "KL in nats"): _kl(result.one_by_one),
        ("favourite tokens", _AGREEMENT): result.lowering.top1 if result.lowering else None,
        ("next-token distribution", "KL in nats"): result.quantization.kl,
        ("baseline: distribution", "KL from fp32, nats"): _kl(result.total),
        ("baseline: size", "bytes"): result.bytes,
    }
    if result.stock is not None and result.stock.examples:
        share = result.stock.matches / result.stock.examples
        known["stock runner", "share of equal texts"] = share
    if (odd := bytes_trouble(result.bytes, result.files)) is not None:
        return odd
    task = result.task
    if task is not None:
        known["task quality", f"{task.metric} difference from fp32, points"] = task.difference
    judged = _verdict_trouble(result.gates, result.passed, result.lost_at)
    return judged or _values_trouble(result.gates, known, task.interval if task else None)


def device_trouble(result: DeviceResult) -> str | None:
    """The same of an artifact on a device."""
    other, task = result.examples - result.identical - result.ties, result.task
    known = {
        ("greedy tokens", "answers that differ"): other,
        ("greedy texts", "texts that differ"): other,
        ("logits", "KL in nats"): _kl(result.measures),
        ("favourite tokens", _AGREEMENT): result.measures.top1 if result.measures else None,
    }
    judged = _verdict_trouble(result.gates, result.passed, result.lost_at)
    if judged is None and task is not None:
        judged = _difference_trouble(task.difference, task.device - task.host, task.interval)
    return judged or _values_trouble(result.gates, known, None)


def _verdict_trouble(gates: Sequence[Gate], passed: bool, lost_at: str | None) -> str | None:
    failed = [gate for gate in gates if not gate.passed]
    if passed and failed:
        return f"passed is true, but the gate {printable(failed[0].name, 60)} failed"
    if not passed and not failed:
        return "passed is false, but every gate passed"
    if (lost_at is None) != passed or not (passed or lost_at in {gate.stage for gate in failed}):
        return f"lost_at is {printable(str(lost_at), 60)}, but no gate that failed says so"
    return None


def _values_trouble(
    gates: Sequence[Gate],
    known: Mapping[tuple[str, str], float | None],
    interval: tuple[float, float] | None,
) -> str | None:
    for gate in gates:
        value = known.get((gate.name, gate.measure))
        if value is None or gate.found is None:
            continue
        if not _same(gate.found, value):
            return f"the gate {gate.name} found {gate.found:g}, but the measure is {value:g}"
        if gate.name == "task quality" and interval is not None:
            lost, shown = interval[1] < gate.limit, interval[0] >= gate.limit
            if (gate.passed, gate.decided) != (not lost, lost or shown):
                return "the verdict of the gate task quality is not that of its interval"
    return None


def _kl(measures: Measures | None) -> float | None:
    return None if measures is None else measures.kl


def _same(said: float, found: float) -> bool:
    return isclose(said, found, rel_tol=1e-6, abs_tol=1e-6)
