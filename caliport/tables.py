"""What a run found, as tables in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from validation.results import (
        ArtifactResult,
        LatencyReport,
        LatencyResult,
        ParityReport,
        QualityReport,
    )

_console = Console()


def show_tables(reports: Path) -> None:
    """Methods by quality, then artifacts by parity and speed, from a run's JSON files."""
    from validation.results import (
        LATENCY,
        PARITY,
        QUALITY,
        LatencyReport,
        ParityReport,
        QualityReport,
        read_result,
    )

    if (reports / QUALITY).exists():
        _methods(read_result(QualityReport, reports / QUALITY))
    if (reports / PARITY).exists():
        times = (
            read_result(LatencyReport, reports / LATENCY) if (reports / LATENCY).exists() else None
        )
        _artifacts(read_result(ParityReport, reports / PARITY), times)


def _methods(report: QualityReport) -> None:
    for composition, result in report.compositions.items():
        table = _table(
            f"{composition}: {result.examples} {result.split} examples, eager fp32",
            ("method", "loss", "ROUGE-L", "chrF", "extra bytes", "passes"),
        )
        for method in result.methods:
            table.add_row(
                method.label,
                "" if method.loss is None else f"{method.loss:.3f}",
                f"{method.rougeL:.1f}",
                f"{method.chrf:.1f}",
                f"{method.bytes:,}",
                str(method.passes),
                style="bold" if method.method == result.best else None,
            )
        _console.print(table)


def _artifacts(parity: ParityReport, latency: LatencyReport | None) -> None:
    times = {t.path: t for t in latency.artifacts} if latency else {}
    for composition in dict.fromkeys(result.composition for result in parity.artifacts):
        results = [r for r in parity.artifacts if r.composition == composition]
        table = _table(
            f"{composition} by {results[0].method}: parity with quantized eager, task against fp32",
            ("artifact", "MB", "KL", "top-1", "task", "stock", "tok/s", "gates"),
        )
        for result in results:
            _artifact(table, result, times.get(result.path))
        _console.print(table)


def _artifact(table: Table, result: ArtifactResult, time: LatencyResult | None) -> None:
    lowering = result.lowering
    table.add_row(
        f"{result.runtime} {result.precision}",
        f"{result.bytes / 1e6:.1f}",
        f"{lowering.kl:.1e}" if lowering else "",
        f"{lowering.top1:.1%}" if lowering else "",
        f"{result.task.difference:+.1f}" if result.task else "",
        f"{result.stock.matches}/{result.stock.examples}" if result.stock else "",
        f"{time.decode_rate.median:.0f}" if time else "",
        _verdict(result),
    )


def _verdict(result: ArtifactResult) -> str:
    if not result.passed:
        return f"[red]FAIL: {result.lost_at}[/red]"
    if not all(gate.decided for gate in result.gates):
        return "[yellow]too few examples[/yellow]"
    return "[green]pass[/green]"


def _table(title: str, heads: tuple[str, ...]) -> Table:
    """A table whose cells never wrap; the first column is text, the others are numbers."""
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", no_wrap=True)
    return table


def show_gates(result: ArtifactResult) -> None:
    """Every gate of one artifact with what was found and why it is held to that."""
    table = Table(title=f"{result.path}: {result.runtime} {result.precision}")
    for name in ("gate", "found", "limit", "verdict", "reason"):
        table.add_column(name)
    for gate in result.gates:
        verdict = "[green]pass[/green]" if gate.passed else f"[red]FAIL: {gate.stage}[/red]"
        if gate.passed and not gate.decided:
            verdict = "[yellow]too few examples[/yellow]"
        found = "" if gate.found is None else f"{gate.found:.3g}"
        table.add_row(gate.name, found, f"{gate.limit:.3g}", verdict, gate.reason)
    _console.print(table)
