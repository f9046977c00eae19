"""The tables of a run, and the notes that belong to them."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.document import markdown
from benchmarks.quantization import rates
from benchmarks.quantization.records import read
from benchmarks.quantization.rows import BASELINES, ROWS, Row

NONE = "–"
_ACCURACY = (
    *("artifact", "KL", "top-1", "perplexity", "WikiText-2 KL", "top-1", "perplexity"),
    *("in the runtime: KL", "top-1", "ROUGE-L"),
)
_COST = ("artifact", "MB", "MB / hqq's", "export s", "peak GB", "prefill", "decode")


def render(out: Path) -> str:
    """All tables of the rows that have been run."""
    records = {name: read(out / f"{name}.json") for name in ROWS}
    found = {name: record for name, record in records.items() if "export" in record}
    speed = read(out / rates.RECORD)
    accuracy = [_accuracy(ROWS[name], record, records["fp32"]) for name, record in found.items()]
    cost = [_cost(name, record, records, speed) for name, record in found.items()]
    parts = [_amounts(found), markdown(_ACCURACY, accuracy), markdown(_COST, cost)]
    failed = [ROWS[name].title for name, record in records.items() if "failed" in record]
    if failed:  # the reasons, which name paths, are in the records
        parts.append(f"Failed: {', '.join(failed)}.")
    return "\n\n".join(part for part in parts if part)


def _amounts(found: dict[str, dict[str, Any]]) -> str:
    """How many tokens and summaries the columns are of."""
    record = next((r for r in found.values() if r.get("weights", {}).get("dialogues")), None)
    if record is None or "runtime" not in record or "summaries" not in record:
        return ""
    tokens = [
        int(part["tokens"])
        for part in (record["weights"]["dialogues"], record["weights"]["articles"])
    ]
    return (
        f"{tokens[0]:,} tokens of dialogues, {tokens[1]:,} of WikiText-2, "
        f"{int(record['runtime']['tokens']):,} of dialogues in the runtime, "
        f"{len(record['summaries']['rougeL'])} summaries."
    )


def _accuracy(row: Row, record: dict[str, Any], floating: dict[str, Any]) -> list[str]:
    weights = record.get("weights", {})
    cells = [row.title]
    for part in ("dialogues", "articles"):
        cells += _distance(weights.get(part))
    cells += _distance(record.get("runtime"))[:2]
    return [*cells, _rouge(record, floating)]


def _distance(found: dict[str, float] | None) -> list[str]:
    if not found:
        return [NONE] * 3
    return [f"{found['kl']:.4f}", f"{found['top1']:.1%}", f"x {found['perplexity']:.3f}"]


def _rouge(record: dict[str, Any], floating: dict[str, Any]) -> str:
    """The mean, and the mean difference from the float model's with its standard error."""
    scores = record.get("summaries", {}).get("rougeL")
    if not scores:
        return NONE
    mean = f"{statistics.fmean(scores):.1f}"
    others = floating.get("summaries", {}).get("rougeL")
    if not others or others == scores or len(others) != len(scores):
        return mean
    pairs = [a - b for a, b in zip(scores, others, strict=True)]
    error = statistics.stdev(pairs) / len(pairs) ** 0.5
    return f"{mean} ({statistics.fmean(pairs):+.1f} ± {error:.1f})"


def _cost(
    name: str, record: dict[str, Any], records: dict[str, dict[str, Any]], speed: dict[str, Any]
) -> list[str]:
    made = record["export"]
    base = records[BASELINES[ROWS[name].runtime]].get("export")
    spread = rates.spreads(speed, name)
    return [
        ROWS[name].title,
        f"{made['bytes'] / 1e6:.1f}",
        f"{made['bytes'] / base['bytes']:.2f}" if base else NONE,
        f"{made['seconds']:.0f}",
        f"{made['peak_bytes'] / 1e9:.2f}",
        *(_rate(spread.get(what)) for what in ("prefill", "decode")),
    ]


def _rate(found: tuple[float, ...] | None) -> str:
    """Ratio to the baseline with its quartiles, and tokens a second."""
    if not found:
        return NONE
    rate, *quartiles = found
    if not quartiles:
        return f"{rate:.0f} tok/s"
    low, middle, high = quartiles
    return f"{middle:.3f} ({low:.3f} to {high:.3f}), {rate:.0f} tok/s"
