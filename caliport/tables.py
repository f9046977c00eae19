"""What a run found, as tables in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from validation.results import ArtifactResult

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


def _methods(report) -> None:  # type: ignore[no-untyped-def]  # its type is heavy to import
    for composition, result in report.compositions.items():
        title = f"{composition}: {result.examples} {result.split} examples, eager fp32"
        table = Table(title=title, title_justify="left")
        for name in ("method", "loss", "ROUGE-L", "chrF", "extra values", "extra bytes", "passes"):
            table.add_column(name, justify="left" if name == "method" else "right")
        for method in result.methods:
            table.add_row(
                method.label,
                "" if method.loss is None else f"{method.loss:.3f}",
                f"{method.rougeL:.1f}",
                f"{method.chrf:.1f}",
                f"{method.parameters:,}",
                f"{method.bytes:,}",
                str(method.passes),
                style="bold" if method.method == result.best else None,
            )
        _console.print(table)


def _artifacts(parity, latency) -> None:  # type: ignore[no-untyped-def]  # as above
    times = {t.path: t for t in latency.artifacts} if latency else {}
    table = Table(title="artifacts: parity with eager PyTorch, speed here", title_justify="left")
    heads = ("artifact", "MB", "max abs", "KL", "top-1", "task", "stock", "tok/s", "gates")
    for name in heads:
        table.add_column(name, justify="left" if name in ("artifact", "gates") else "right")
    for result in parity.artifacts:
        time = times.get(result.path)
        lowering = result.lowering
        table.add_row(
            result.path,
            f"{result.bytes / 1e6:.1f}",
            f"{lowering.max_abs:.1e}" if lowering else "",
            f"{lowering.kl:.1e}" if lowering else "",
            f"{lowering.top1:.1%}" if lowering else "",
            f"{result.task.difference:+.1f}" if result.task else "",
            f"{result.stock.matches}/{result.stock.examples}" if result.stock else "",
            f"{time.decode_rate.median:.0f}" if time else "",
            "[green]pass[/green]" if result.passed else f"[red]FAIL: {result.lost_at}[/red]",
        )
    _console.print(table)


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
