"""Render ``results.json`` as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from benchmarks.bundles.exporting import ARTIFACTS, FOLDED
from benchmarks.bundles.records import Results, Way
from benchmarks.document import markdown

_FAMILIES = {"merged": "LC++", "alone": "corrections alone"}
_RUNS = {
    "folded": "folded",
    "methods": "methods",
    "cached": "methods, packed weights shared",
    "inputs": "inputs",
}
_RATIOS = ("load", "memory", "prefill", "decode")  # shown against the folded artifact
_PARTS = {"adapters": "adapters", "own": "corrections", "programs": "programs", "total": "all"}


def render(results: Results) -> str:
    """All tables with their explanations."""
    return "\n\n".join(_parts(results))


def added(results: Results, artifact: str) -> float:
    """Bytes that compositions add to base and adapters, relative to the folded program."""
    parts = results.parts[artifact]
    return (parts["own"] + parts["programs"]) / parts["base"]


def whole(results: Results, artifact: str) -> float:
    """Bytes of the whole bundle relative to the folded program."""
    return results.parts[artifact]["total"] / results.parts[artifact]["base"]


def _parts(results: Results) -> Iterable[str]:
    machine = results.machine
    runtimes = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    yield (
        f"{results.parameters:,} parameters, context {results.context}, {results.compositions} "
        f"compositions. {machine.cpu}, {machine.cores} cores, {machine.memory_gb:.0f} GB, "
        f"{results.threads} threads; {runtimes}. Prefill is of {results.prompt_tokens} tokens, "
        f"decode of the {results.new_tokens} after them; medians."
    )
    yield _sizes(results)
    for family in results.ways:
        yield _speeds(results, family)
    yield "Logits after the prompt, methods against inputs: " + "; ".join(
        f"{_FAMILIES[family]}, largest difference {found.difference:.3f} of the largest, cosine "
        f"{found.cosine:.5f}"
        for family, found in results.parity.items()
    )


def _sizes(results: Results) -> str:
    """Bytes by part, and time and memory of the export."""
    rows = []
    for name in ARTIFACTS:
        parts, made = results.parts[name], results.exports[name]
        sizes = [f"{parts[part] / 1e6:.1f} MB" if parts[part] else "" for part in _PARTS]
        shares = (
            ["", "1.000"]
            if name == FOLDED
            else [
                f"{added(results, name):.4f}",
                f"{whole(results, name):.3f}",
            ]
        )
        took = [f"{made.seconds:.0f} s", f"{made.peak_bytes / 1e9:.1f} GB"]
        family, _, way = name.rpartition("-")
        title = f"{_FAMILIES[family]}, {way}" if family else name
        rows.append([title, *sizes, *shares, *took])
    heads = ["", *_PARTS.values(), "added", "all / folded", "export", "peak memory"]
    return markdown(heads, rows)


def _speeds(results: Results, family: str) -> str:
    """Speed and memory of one family."""
    ways = results.ways[family]
    units: tuple[tuple[str, Callable[[Way], float | None], str], ...] = (
        ("load", lambda w: _median(w.load), "{:.1f} s"),
        ("memory", lambda w: w.memory / 1e6, "{:.0f} MB"),
        ("each further", lambda w: _median([m / 1e6 for m in w.more]), "{:.0f} MB"),
        ("prefill", lambda w: _median(w.prefill), "{:.0f} tok/s"),
        ("decode", lambda w: _median(w.decode), "{:.1f} tok/s"),
        ("first switch", lambda w: _median([1e3 * s for s in w.cold]), "{:.0f} ms"),
        ("switch back", lambda w: _median([1e3 * s for s in w.warm]), "{:.0f} ms"),
    )
    rows = []
    for run, way in ways.items():
        cells = [_RUNS[run]]
        for head, get, form in units:
            value, folded = get(way), get(ways[FOLDED])
            text = "" if value is None else form.format(value)
            if value and folded and head in _RATIOS:
                text = f"{value / folded:.2f} ({text})"
            cells.append(text)
        rows.append(cells)
    return markdown([_FAMILIES[family], *(head for head, _, _ in units)], rows)


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
