"""Results for a CI job: a summary, annotations, and outputs of the step."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from caliport.core.errors import InputError, printable

if TYPE_CHECKING:
    from caliport.validation.records.device import DeviceResult
    from caliport.validation.records.latency import LatencyResult
    from caliport.validation.records.reports import ArtifactResult, ParityReport

_MOST = 10  # GitHub shows this many errors and this many warnings of a step


def publish(
    report: ParityReport, times: Sequence[LatencyResult], source: Path, reports: Path | None
) -> None:
    """Write ``summary.md`` and, within GitHub Actions, tell the job what was found.

    ``GITHUB_STEP_SUMMARY`` gets the summary, ``GITHUB_OUTPUT`` the outputs ``verdict`` (pass,
    unsure or fail) and ``reports``, and where ``GITHUB_ACTIONS`` is ``true`` standard output gets
    an annotation for each artifact that failed or is undecided.

    Args:
        report: What was found.
        times: Latency of the same artifacts.
        source: The file that annotations point at: a recipe or an artifact's manifest.
        reports: Where the summary is kept; None for nowhere.

    Raises:
        InputError: A file cannot be written.
    """
    from caliport.core.places import write_text
    from caliport.validation.records.reports import SUMMARY
    from caliport.validation.report.headline import headline
    from caliport.validation.report.summary import summary

    text = summary(report, times)
    if reports is not None:
        write_text(reports / SUMMARY, text)
    _append("GITHUB_STEP_SUMMARY", text)
    outputs = f"verdict={headline(report.artifacts, devices=report.devices).state}\n"
    if reports is not None:
        outputs += f"reports={reports}\n"
    _append("GITHUB_OUTPUT", outputs)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in workflow_commands([*report.artifacts, *report.devices], source):
            print(line)


def publish_run(reports: Path, source: Path) -> None:
    """``publish`` what a run's reports directory holds; ``source`` is the recipe."""
    from caliport.validation.records.latency import LatencyReport
    from caliport.validation.records.reports import (
        LATENCY,
        PARITY,
        ParityReport,
        read_if_there,
        read_result,
    )

    latency = read_if_there(LatencyReport, reports / LATENCY)
    parity = read_result(ParityReport, reports / PARITY)
    publish(parity, latency.artifacts if latency else [], source, reports)


def workflow_commands(
    artifacts: Sequence[ArtifactResult | DeviceResult], source: Path
) -> Iterator[str]:
    """A workflow command for each artifact that failed (error) or is undecided (warning).

    One an artifact, with all its reasons, since only ten of each kind are shown; the tenth stands
    for all that are left.
    """
    from caliport.validation.baseline.baseline import name_of

    file = _property(_in_repository(source))
    failed = [a for a in artifacts if not a.passed]
    unsure = [a for a in artifacts if a.passed and not all(gate.decided for gate in a.gates)]
    for kind, those in (("error", failed), ("warning", unsure)):
        for artifact in those if len(those) <= _MOST else those[: _MOST - 1]:
            wrong = [g for g in artifact.gates if not (g.passed and g.decided)]
            where = f"lost at {artifact.lost_at}" if kind == "error" else "undecided"
            title = _property(f"{name_of(artifact)}: {where}")
            reasons = _data("\n".join(f"{gate.name}: {gate.reason}" for gate in wrong))
            yield f"::{kind} file={file},title={title}::{reasons}"
        if len(those) > _MOST:
            rest = _data(", ".join(name_of(artifact) for artifact in those[_MOST - 1 :]))
            title = _property(f"{len(those) - _MOST + 1} more artifacts")
            yield f"::{kind} file={file},title={title}::{rest}"


def _append(variable: str, text: str) -> None:
    path = os.environ.get(variable)
    if path:
        try:
            with Path(path).open("a", encoding="utf-8") as stream:
                stream.write(text)
        except OSError as error:
            raise InputError(
                f"{variable} is {path}: cannot be written: {error.strerror}; expected a writable "
                "file"
            ) from None


def _in_repository(path: Path) -> str:
    """Relative to the checked-out repository, as annotations want it, where it is inside it."""
    root = Path(os.environ.get("GITHUB_WORKSPACE") or Path.cwd()).resolve()
    found = path.resolve()
    return found.relative_to(root).as_posix() if found.is_relative_to(root) else str(path)


def _data(text: str) -> str:
    lines = (printable(line, len(line) + 1) for line in text.split("\n"))
    return "%0A".join(line.replace("%", "%25") for line in lines)


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
