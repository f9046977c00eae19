"""The verdict of a run as Markdown, for a pull request or a job's page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from caliport.validation.baseline.baseline import name_of, speed_of, time_of
from caliport.validation.records.device import DeviceResult
from caliport.validation.records.gate import Gate
from caliport.validation.records.latency import LatencyResult
from caliport.validation.records.reports import ArtifactResult, ParityReport
from caliport.validation.report.budget_summary import lost_and_gained
from caliport.validation.report.headline import headline
from caliport.validation.report.names import size

LONGEST = 60_000
"""Bytes; a comment holds 65,536 characters and a job's page 1 MiB."""
_LONGEST_REASON = 400
_ROOM = 200  # bytes for the line that says what was left out
_MARKS = {"pass": "✓", "unsure": "?", "fail": "✕", "none": "–"}


def summary(report: ParityReport, times: Sequence[LatencyResult] = ()) -> str:
    """Verdict, a table of the artifacts with those that failed first, losses, then every reason.

    Args:
        report: With its gates, those against a baseline too.
        times: Latency of the same artifacts, as far as they were timed.

    Returns:
        Markdown of at most ``LONGEST`` bytes. Lines that find no room are counted in the last.
    """
    lines = list(_lines(report, times))
    kept, used = [], 0
    for line in lines:
        used += len(line.encode()) + 1
        if used > LONGEST - _ROOM:
            break
        kept.append(line)
    if len(kept) < len(lines):
        kept += ["", f"… and {len(lines) - len(kept)} more lines; the report has them all."]
    return "\n".join(kept) + "\n"


def _lines(report: ParityReport, times: Sequence[LatencyResult]) -> Iterator[str]:
    found = headline(report.artifacts, devices=report.devices)
    yield f"## {_MARKS[found.state]} {found.title}"
    yield ""
    yield found.text
    yield ""
    order = sorted(report.artifacts, key=lambda artifact: artifact.passed)
    if order:
        yield "| artifact | verdict | size | task, points | KL from fp32 | top-1 | speed |"
        yield "|---|---|---:|---:|---:|---:|---:|"
    for artifact in order:
        yield _row(artifact, times)
    if report.devices:
        yield from ("", "| on a device | verdict | identical answers | KL from the host | task |")
        yield "|---|---|---:|---:|---:|"
    yield from map(_device_row, sorted(report.devices, key=lambda result: result.passed))
    if report.budgets:
        yield from ("", "### Accuracy loss by stage", "")
    for budget in report.budgets:
        yield f"- **{plain(budget.composition)}**: {plain(lost_and_gained(budget))}"
    results: list[ArtifactResult | DeviceResult] = [*order, *report.devices]
    for title, wrong in (("Failed", _failed), ("Undecided", _unsure)):
        those = [result for result in results if wrong(result)]
        if those:
            yield from ("", f"### {title}", "")
        for result in those:
            where = f", lost at **{plain(result.lost_at or '')}**" if title == "Failed" else ""
            yield f"- **{plain(name_of(result))}**{where}"
            for gate in wrong(result):
                yield f"  - {plain(gate.name)}: {plain(_cut(gate.reason))}"
    if report.baseline is not None:
        machine = report.baseline.machine
        yield ""
        yield (
            f"Held to {plain(report.baseline.file)}, made on {plain(machine.cpu)} with "
            f"{machine.cores} cores."
        )
        for note in report.baseline.notes:
            yield f"- {plain(_cut(note))}"
    machine, versions = report.machine, report.versions
    yield ""
    yield f"{plain(machine.cpu)}, {machine.cores} cores, {plain(machine.os)}; " + ", ".join(
        f"{plain(package)} {plain(version)}" for package, version in versions.items()
    )
    if times:
        yield ""
        yield (
            "Speed is the decode rate over that of the run's fp32 artifact in the same runtime; a "
            "dash is that one itself, or times too noisy to say."
        )


def _row(artifact: ArtifactResult, times: Sequence[LatencyResult]) -> str:
    time = time_of(artifact, times)
    speed = speed_of(time, times).relative if time else None
    verdict = "✓ pass"
    if not artifact.passed:
        verdict = f"✕ lost at {plain(artifact.lost_at or '')}"
    elif _unsure(artifact):
        verdict = "? undecided"
    cells = (
        plain(name_of(artifact)),
        verdict,
        size(artifact.bytes),
        f"{artifact.task.difference:+.2f}" if artifact.task else "–",
        f"{artifact.total.kl:.2g}" if artifact.total else "–",
        f"{artifact.total.top1:.1%}" if artifact.total else "–",
        f"{speed.value:.2f} ×" if speed else "–",
    )
    return f"| {' | '.join(cells)} |"


def _device_row(result: DeviceResult) -> str:
    label = f", {result.device.label}" if result.device.label else ""
    cells = (
        plain(f"{result.name}{label}"),
        "✓ pass" if result.passed else "✕ lost at device",
        f"{result.identical} of {result.examples}",
        f"{result.measures.kl:.2g}" if result.measures else "–",
        f"{result.task.difference:+.2f}" if result.task else "–",
    )
    return f"| {' | '.join(cells)} |"


def _failed(artifact: ArtifactResult | DeviceResult) -> list[Gate]:
    return [gate for gate in artifact.gates if not gate.passed]


def _unsure(artifact: ArtifactResult | DeviceResult) -> list[Gate]:
    return [gate for gate in artifact.gates if gate.passed and not gate.decided]


def plain(text: str) -> str:
    """Text on one line in which nothing is Markdown, HTML or the mention of a user."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", line).replace("@", "&#64;")


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"
