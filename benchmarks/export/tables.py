"""Render ``results.json`` as Markdown tables between two markers in docs/results.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from benchmarks.document import markdown, put
from benchmarks.export.exporters import EXPORTERS
from benchmarks.export.records import Export, Results, Speed

_OURS = {"executorch": "caliport-executorch", "onnx": "caliport-onnx"}
_NAMES = {"executorch": "ExecuTorch", "onnx": "ONNX"}
_HEADS = ("export", "peak memory", "size", "prefill", "decode", "logits")
_LEFT_OUT = (
    "Left out: Olive (olive-ai 0.13.0). For a Hugging Face decoder in int4 on a CPU its `auto-opt` "
    "only calls the model builder, and its `optimize` calls it after GPTQ, which needs calibration "
    "text; graph and kernels would be the model builder's."
)
_PROGRAMS = (".pte", ".ptd", ".onnx", ".data")


def write_tables(results: Results, path: Path) -> None:
    """Replace the text between the markers; the rest of the file is unchanged.

    Raises:
        InputError: The file does not have the markers.
    """
    put("export", render(results), path)


def render(results: Results) -> str:
    """All tables with their explanations."""
    return "\n\n".join(_parts(results))


def _parts(results: Results) -> Iterable[str]:
    machine = results.machine
    runtimes = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    yield (
        f"{results.parameters:,} parameters, context {results.context}. "
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_gb:.0f} GB; {results.threads} "
        f"threads for every export and artifact. Prefill is of {results.prompt_tokens} tokens, "
        f"decode of the {results.new_tokens} after them, medians of {_rounds(results)} turns, all "
        f"artifacts with {runtimes}."
    )
    yield (
        "Each number is a ratio to caliport's for the same runtime: time, memory and size above 1 "
        "are more than ours, rates above 1 are faster. Size is of the program and its weights. "
        "The last column is not a ratio but the cosine of the logits after the prompt with those "
        "of the float32 checkpoint."
    )
    for runtime in _OURS:
        table = _table(results, runtime)
        if table:
            yield table
    yield _LEFT_OUT
    yield "Versions: " + "; ".join(
        f"{_title(name)} with {', '.join(f'{p} {v}' for p, v in export.versions.items())}"
        for name, export in results.exports.items()
    )


def _rounds(results: Results) -> int:
    return max((len(speed.decode) for speed in results.speeds), default=0)


def _title(name: str) -> str:
    return f"{EXPORTERS[name].title} ({_NAMES[EXPORTERS[name].runtime]})"


def _table(results: Results, runtime: str) -> str:
    """One row per artifact and way to run it; empty without exports for the runtime."""
    exports = {n: e for n, e in results.exports.items() if EXPORTERS[n].runtime == runtime}
    ours = exports.get(_OURS[runtime])
    our_speeds = {speed.variant: speed for speed in _speeds(results, _OURS[runtime])}
    rows = []
    for name, export in exports.items():
        made = _made(export, ours)
        found: list[Speed | None] = [*_speeds(results, name)] or [None]
        for speed in found:
            variant = f", {speed.variant}" if speed and speed.variant else ""
            rows.append([f"{EXPORTERS[name].title}{variant}", *made, *_ran(speed, our_speeds)])
            made = [""] * len(made)
    return markdown([_NAMES[runtime], *_HEADS], rows) if rows else ""


def _speeds(results: Results, name: str) -> list[Speed]:
    return [speed for speed in results.speeds if speed.exporter == name]


def _made(export: Export, ours: Export | None) -> list[str]:
    """Time and peak memory of the export, and size of the artifact."""
    units: tuple[tuple[Callable[[Export], float], str], ...] = (
        (lambda e: e.seconds, "{:.0f} s"),
        (lambda e: e.peak_bytes / 1e9, "{:.1f} GB"),
        (lambda e: program_bytes(e) / 1e6, "{:.3g} MB"),
    )
    return [_ratio(get(export), get(ours) if ours else None, form) for get, form in units]


def _ran(speed: Speed | None, run_as: Mapping[str, Speed]) -> list[str]:
    """Its speed relative to caliport's artifact run the same way, and its cosine."""
    if speed is None:
        return ["", "", ""]
    ours = run_as.get(speed.variant)
    prefill, decode = map(statistics.median, (speed.prefill, speed.decode))
    our_prefill = statistics.median(ours.prefill) if ours else None
    our_decode = statistics.median(ours.decode) if ours else None
    return [
        _ratio(prefill, our_prefill, "{:.0f} tok/s"),
        _ratio(decode, our_decode, "{:.1f} tok/s"),
        f"{speed.cosine:.4f}",
    ]


def program_bytes(export: Export) -> int:
    """Bytes of the files that a runtime loads, without tokenizers and configurations."""
    return sum(size for name, size in export.files.items() if name.endswith(_PROGRAMS))


def _ratio(value: float, ours: float | None, form: str) -> str:
    absolute = form.format(value)
    return f"{value / ours:.2f} ({absolute})" if ours else absolute
