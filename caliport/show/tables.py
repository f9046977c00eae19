"""Results as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from caliport.core.progress import PlainConsole
from caliport.show.example import show_example

if TYPE_CHECKING:
    from caliport.validation.records.audit import CompositionAudit
    from caliport.validation.records.budget import Budget
    from caliport.validation.records.device import DeviceResult
    from caliport.validation.records.latency import LatencyReport, LatencyResult, Spread
    from caliport.validation.records.own_task import OwnTask
    from caliport.validation.records.reports import (
        ArtifactResult,
        CompositionResult,
        ParityReport,
        QualityReport,
    )
    from caliport.validation.report.audit_summary import Summary

_console = PlainConsole()


def show_tables(reports: Path) -> None:
    """Methods by quality, then artifacts by parity and speed, from a run's JSON files."""
    from caliport.validation.records.latency import LatencyReport
    from caliport.validation.records.reports import (
        LATENCY,
        PARITY,
        QUALITY,
        ParityReport,
        QualityReport,
        read_if_there,
    )

    quality = read_if_there(QualityReport, reports / QUALITY)
    parity = read_if_there(ParityReport, reports / PARITY)
    if quality is not None:
        _methods(quality)
    if parity is not None:
        _artifacts(parity, read_if_there(LatencyReport, reports / LATENCY))
        for budget in parity.budgets:
            show_budget(budget)
        show_devices(parity)
        show_baseline(parity)
    if quality is not None:
        show_example(quality, parity)


def _methods(report: QualityReport) -> None:
    for composition, result in report.compositions.items():
        # Columns that not every run has: the paper's metric for replies, and a judge.
        more = {}
        if report.metric == "weighted_rouge":
            more["weighted ROUGE"] = [m.weighted_rouge for m in result.methods]
        if any(m.judge is not None for m in result.methods):
            more["judge %"] = [m.judge for m in result.methods]
        chosen = f"; in bold: best on {result.chosen_on} others" if result.chosen_on else ""
        table = table_of(
            f"{composition}: {result.examples} {result.split} examples, eager fp32{chosen}",
            ("method", "loss", "ROUGE-L", "chrF", *more, "extra bytes", "passes"),
        )
        for index, method in enumerate(result.methods):
            table.add_row(
                method.label,
                "" if method.loss is None else f"{method.loss:.3f}",
                f"{method.rougeL:.1f}",
                f"{method.chrf:.1f}",
                *("" if (v := values[index]) is None else f"{v:.1f}" for values in more.values()),
                f"{method.bytes:,}",
                str(method.passes),
                style="bold" if method.method == result.best else None,
            )
        _console.print(table)
        _quantized(composition, result)


def _quantized(composition: str, result: CompositionResult) -> None:
    """Methods with the weights that ship; nothing where none was scored so."""
    rows = [(m, w, q) for m in result.methods for w, q in m.quantized.items()]
    if not rows:
        return
    heads = ("method", "weights", "loss", "against fp32", "ROUGE-L", "chrF")
    table = table_of(f"{composition}: what quantization cost", heads)
    for method, weights, found in rows:
        against = "" if method.loss is None else f"{found.loss - method.loss:+.4f}"
        scores = (f"{found.loss:.4f}", against, f"{found.rougeL:.1f}", f"{found.chrf:.1f}")
        table.add_row(method.label, weights, *scores)
    _console.print(table)


def _artifacts(parity: ParityReport, latency: LatencyReport | None) -> None:
    times = {(t.path, t.composition): t for t in latency.artifacts} if latency else {}
    for composition in dict.fromkeys(result.composition for result in parity.artifacts):
        results = [r for r in parity.artifacts if r.composition == composition]
        table = table_of(
            f"{composition} by {results[0].method}: parity with quantized eager, task against fp32",
            ("artifact", "MB", "KL", "top-1", "task", "stock", "tok/s", "gates"),
        )
        for result in results:
            _artifact(table, result, times.get((result.path, composition)))
        _console.print(table)


def _artifact(table: Table, result: ArtifactResult, time: LatencyResult | None) -> None:
    lowering = result.lowering
    table.add_row(
        f"{result.runtime} {result.form}",
        f"{result.bytes / 1e6:.1f}",
        f"{lowering.kl:.1e}" if lowering else "",
        f"{lowering.top1:.1%}" if lowering else "",
        f"{result.task.difference:+.1f}" if result.task else "",
        f"{result.stock.matches}/{result.stock.examples}" if result.stock else "",
        f"{time.decode_rate.median:.0f}" if time else "",
        _verdict(result),
    )


def show_budget(budget: Budget) -> None:
    """Accuracy loss by stage: each stage of a composition against the one before it."""
    table = table_of(
        f"{budget.composition}: error budget; KL and top-1 are against the stage before,\n"
        "of a quantized eager model that is calibration",
        ("stage", "form", "KL", "top-1", "perplexity", "task"),
    )
    table.columns[1].justify = "left"
    for stage in budget.stages:
        before = stage.previous
        table.add_row(
            stage.stage,
            stage.form or stage.label,
            f"{before.kl:.1e}" if before else "",
            f"{before.top1:.1%}" if before else "",
            f"{stage.perplexity:#.4g}",
            "" if stage.task is None else f"{stage.task:.1f}",
            end_section=not stage.form and stage.stage == "calibration",
        )
    _console.print(table)


def _verdict(result: ArtifactResult | DeviceResult) -> Text:
    if not result.passed:
        return Text(f"FAIL: {result.lost_at}", "red")
    if not all(gate.decided for gate in result.gates):
        return Text("undecided", "yellow")
    return Text("pass", "green")


def table_of(title: str, heads: tuple[str, ...]) -> Table:
    """A table whose cells never wrap; the first column is text, the others are numbers."""
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", no_wrap=True)
    return table


def show_audit(title: str, audit: CompositionAudit) -> None:
    """Adapters and merges of one composition by component, then a verdict on each merge."""
    from caliport.validation.report.audit_summary import summaries, summary

    rows = {**summaries(audit, lambda m: m.component), "all": summary(audit, audit.modules)}
    _adapters(title, audit, rows)
    _overlap(rows)
    _merge_errors(audit, rows)
    show_verdicts(audit)
    show_own(audit.own)


def show_verdicts(audit: CompositionAudit) -> None:
    """One line a merge: how far it is from the weighted sum."""
    terms = " + ".join(f"{weight:.3g}·{name}" for name, weight in audit.weights.items())
    _console.print(Text(f"Merges against the weighted sum {terms}:"))
    for merge in audit.merges:
        colour = {"exact": "green", "close": "green", "far": "red"}.get(merge.verdict, "yellow")
        _console.print(Text.assemble((merge.merge, f"bold {colour}"), f": {merge.text}"))


def show_own(own: Mapping[str, OwnTask]) -> None:
    """One line an adapter: what it does for its own task."""
    for task, found in own.items():
        style = "bold green" if found.matters else "bold red"
        _console.print(Text.assemble("adapter ", (task, style), f": {found.text}"))


def show_far(title: str, audit: CompositionAudit) -> None:
    """Only the merges that are far from the weighted sum, one line each."""
    for merge in audit.merges:
        if merge.verdict == "far":
            _console.print(
                Text.assemble(f"{title}: ", (merge.merge, "bold red"), f": {merge.text}")
            )


def _adapters(title: str, audit: CompositionAudit, rows: Mapping[str, Summary]) -> None:
    heads = ("component", *audit.weights)
    table = table_of(f"{title}: norm of ΔW; nominal, numerical, effective rank", heads)
    for component, row in rows.items():
        parts = [row.adapters.get(name) for name in audit.weights]
        cells = [
            f"{p.norm:.3g}; {p.rank:.3g} {p.numerical_rank:.3g} {p.effective_rank:.1f}" if p else ""
            for p in parts
        ]
        table.add_row(component, *cells, style=_last(component))
    _console.print(table)


def _overlap(rows: Mapping[str, Summary]) -> None:
    from caliport.validation.report.audit_summary import shown_cosine

    heads = ("component", "ΔW", "columns", "rows")
    table = table_of("cosines; of spaces: mean, highest, at most by chance", heads)
    for component, row in rows.items():
        cells = [shown_cosine(row.cosine)]
        for angles in (row.columns, row.rows):
            found = (angles.mean, angles.highest, angles.chance) if angles else ()
            cells.append(" ".join(f"{cosine:.2f}" for cosine in found))
        table.add_row(component, *cells, style=_last(component))
    _console.print(table)


def _merge_errors(audit: CompositionAudit, rows: Mapping[str, Summary]) -> None:
    from caliport.validation.report.audit_summary import applied, shown

    table = table_of("relative error of each merge", ("component", *applied(audit)))
    for component, row in rows.items():
        cells = [shown(error) for error in row.errors.values()]
        table.add_row(component, *cells, style=_last(component))
    _console.print(table)


def _last(component: str) -> str | None:
    return "bold" if component == "all" else None


def show_baseline(report: ParityReport) -> None:
    """The baseline that artifacts were compared with, and what was not; nothing without one."""
    if report.baseline is not None:
        _console.print(Text(f"held to {report.baseline.file}"))
        for note in report.baseline.notes:
            _console.print(Text(note, "yellow"))


def show_devices(report: ParityReport) -> None:
    """Each artifact on each device against itself on this machine; nothing without any."""
    if not report.devices:
        return
    for device in {result.device.serial: result.device for result in report.devices}.values():
        table = table_of(
            f"on {device.shown}: parity with the host",
            ("artifact", "same", "near ties", "KL", "task", "gates"),
        )
        results = [each for each in report.devices if each.device.serial == device.serial]
        for result in results:
            table.add_row(
                f"{result.composition}: {result.runtime} {result.form}",
                f"{result.identical}/{result.examples}",
                str(result.ties),
                f"{result.measures.kl:.1e}" if result.measures else "",
                f"{result.task.difference:+.1f}" if result.task else "",
                _verdict(result),
            )
        runners = dict.fromkeys(f"{each.runner} ({each.runner_sha256[:8]})" for each in results)
        table.caption = f"same: greedy answers; run by {', '.join(runners)}"
        _console.print(table)


def show_gates(result: ArtifactResult | DeviceResult) -> None:
    """Every gate of one artifact, with what was found and the reason for the limit."""
    from caliport.validation.records.device import DeviceResult

    name = f"{result.path}, {result.composition}" if result.bundle else result.path
    where = f" on {result.device.shown}" if isinstance(result, DeviceResult) else ""
    table = Table(title=f"{name}: {result.runtime} {result.form}{where}")
    for name in ("gate", "found", "limit", "verdict", "reason"):
        table.add_column(name)
    for gate in result.gates:
        verdict = Text("pass", "green") if gate.passed else Text(f"FAIL: {gate.stage}", "red")
        if gate.passed and not gate.decided:
            verdict = Text("undecided", "yellow")
        found = "" if gate.found is None else f"{gate.found:.3g}"
        table.add_row(gate.name, found, f"{gate.limit:.3g}", verdict, gate.reason)
    _console.print(table)
    for note in result.notes:
        _console.print(Text(note, "yellow"))


def show_latency(report: LatencyReport) -> None:
    """Times of every artifact, then memory, bandwidth and ratios to the first.

    Each is shown as its ``composition``. There is no ratio where one of the two was too noisy.
    """
    from caliport.validation.latency.statistics import ratio

    first = report.artifacts[0]
    threads = f"{first.threads} thread{'s' if first.threads > 1 else ''}"
    where = f"pinned to {', '.join(map(str, report.cores))}" if report.cores else "not pinned"
    times = table_of(
        f"latency: {first.prompt_tokens} prompt tokens, {first.new_tokens} new ones; {threads}, "
        f"{where};\nmedians of {first.repetitions} rounds ± half their "
        f"{first.decode_rate.level:.0%} intervals",
        ("artifact", "load", "first token", "tokens/s", "9 of 10 within"),
    )
    others = ("first token ×", "tokens/s ×") if len(report.artifacts) > 1 else ()
    title = f"memory, and ratios to {first.composition}" if others else "memory"
    more = table_of(title, ("artifact", "peak MB", "of bandwidth", *others))
    for result in report.artifacts:
        times.add_row(
            result.composition,
            f"{result.load_seconds.median:.2f} s",
            _give_or_take(result.first_token_seconds, 1e3, " ms"),
            _give_or_take(result.decode_rate),
            f"{1e3 * result.token_p90_seconds:.3g} ms",
        )
        share, peak = result.bandwidth_share, result.peak_bytes
        ratios = (ratio(result, first, name) for name in ("first_token_seconds", "decode_rate"))
        more.add_row(
            result.composition,
            "–" if peak is None else f"{peak / 1e6:.0f}",
            "–" if share is None else f"{share:.0%}",
            *("too noisy" if r is None else _give_or_take(r) for r in ratios if others),
        )
    _console.print(times)
    _console.print(more)
    read = f"bandwidth: {report.bandwidth_gbs:.1f} GB/s are what {threads} read from memory here"
    _console.print(f"{read}; weights that fit the processor's cache have no share", highlight=False)


def show_device_latency(report: LatencyReport) -> None:
    """Times of every artifact on a device; only memory where its times are no results."""
    assert report.device is not None
    device, first = report.device.device, report.artifacts[0]
    lengths = () if device.label else first.lengths
    heads = ("load", *(f"first of {each.prompt_tokens}" for each in lengths), "tokens/s", "p90")
    threads = f"{first.threads} thread{'s' if first.threads > 1 else ''}"
    where = f"on cores {', '.join(map(str, report.cores))}" if report.cores else "on any core"
    _console.print(Text(f"on {device.shown}", "yellow" if device.label else ""), soft_wrap=True)
    title = "memory"
    if not device.label:
        title = f"latency: {first.new_tokens} new tokens, {threads} {where}; medians of "
        title += f"{first.repetitions} rounds;\nfirst tokens and p90 (9 of 10 within) in ms"
    table = table_of(title, ("artifact", *(() if device.label else heads), "peak MB"))
    for result in report.artifacts:
        cells = (
            f"{result.load_seconds.median:.2f} s",
            *(
                f"{1e3 * each.first_token_seconds.median:.4g} ({1e3 * each.p90_seconds:.4g})"
                for each in result.lengths
            ),
            _give_or_take(result.decode_rate),
            f"{1e3 * result.token_p90_seconds:.3g}",
        )
        peak = "–" if result.peak_bytes is None else f"{result.peak_bytes / 1e6:.0f}"
        table.add_row(result.composition, *(() if device.label else cells), peak)
    _console.print(table)
    if report.device.noise is not None and not device.label:
        _console.print(Text(f"too warm to compare: {report.device.noise}", "yellow"))


def _give_or_take(spread: Spread, scale: float = 1, unit: str = "") -> str:
    half = (spread.interval[1] - spread.interval[0]) / 2 / spread.median
    value = scale * spread.median
    shown = f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".removesuffix(".")
    return f"{shown}{unit} ±{half:.0%}"
