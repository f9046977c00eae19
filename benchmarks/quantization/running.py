"""Make a row's artifact and measure it; finished parts are kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.export.exporters import fresh
from benchmarks.export.measuring import measured
from benchmarks.quantization.llama import LlamaRunner
from benchmarks.quantization.measuring import Meter
from benchmarks.quantization.peers import TOOLS, Request, environment
from benchmarks.quantization.records import part, read, write


def complete(request: Request, record: Path, meter: Meter, peers: Path) -> bool:
    """Make one row's artifact and measure it, as far as that is not done.

    Args:
        request: What to make and where.
        record: The row's record.
        meter: What measures it.
        peers: The directory of the tools' environments.

    Returns:
        Whether anything was done.

    Raises:
        InputError: The tool failed, or its artifact cannot be run.
    """
    row, directory, amount = request.row, request.artifact, meter.amount
    text = request.tokens if row.text else 0
    key: dict[str, Any] = {
        "base": request.base.name,
        "tool": row.tool,
        "options": list(row.options),
        "tokens": text,
    }
    done = part(record, "export", key, lambda: _export(request, record.with_suffix(".log")))
    done |= part(
        record,
        "weights",
        {**key, "count": amount.count},
        lambda: meter.weights(row, directory),
    )
    runtime = {**key, "slice": amount.slice}
    summaries = {**key, "summaries": amount.summaries}
    known = read(record)
    if _has(known, "runtime", runtime) and _has(known, "summaries", summaries):
        return done
    runner = meter.open(row, directory, peers)
    try:
        part(record, "runtime", runtime, lambda: meter.artifact(runner))
        part(record, "summaries", summaries, lambda: meter.summaries(runner))
    finally:
        if isinstance(runner, LlamaRunner):
            runner.close()
    found = read(record)
    found.pop("failed", None)
    write(record, found)
    return True


def _has(known: dict[str, Any], name: str, key: dict[str, Any]) -> bool:
    return bool(known.get(name, {}).get("key") == key)


def _export(request: Request, log: Path) -> dict[str, Any]:
    """Run the tool's command and measure it."""
    tool = TOOLS[request.row.tool]
    shutil.rmtree(request.artifact, ignore_errors=True)
    fresh(request.work)
    tool.prepare(request)
    variables = environment(request.row.tool)
    usage = measured(tool.command(request), log, cwd=request.work, environment=variables)
    shutil.rmtree(request.work)
    return {
        "seconds": usage.seconds,
        "peak_bytes": usage.peak_bytes,
        "bytes": sum(path.stat().st_size for path in request.artifact.glob("model.*")),
    }
