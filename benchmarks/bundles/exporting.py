"""Export the artifacts: one fold, and a bundle of each family in each way."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bundles.adapters import FAMILIES, needed
from benchmarks.bundles.speed import PROGRAM
from benchmarks.children import child
from benchmarks.export.measuring import measured
from benchmarks.export.records import Export, read_export, write_record
from caliport.core.directories import read_manifest, versions
from caliport.validation.records.reports import file_sizes

FOLDED = "folded"
WAYS = ("methods", "inputs")
RUNS = (FOLDED, "methods", "cached", "inputs")
"""Runs of each family; ``cached`` are the methods with shared packed weights."""
ARTIFACTS = (FOLDED, *(f"{family}-{way}" for family in FAMILIES for way in WAYS))
SHOWN = ("executorch", "torch", "torchao", "transformers")


def way_of(artifact: str) -> str:
    """``folded``, ``methods`` or ``inputs``."""
    return artifact.rpartition("-")[2]


def family_of(artifact: str) -> str:
    """One of ``FAMILIES``; the folded artifact belongs to the first."""
    return artifact.partition("-")[0] if artifact != FOLDED else FAMILIES[0]


def artifact_of(family: str, run: str) -> str:
    """The artifact that a run uses."""
    return FOLDED if run == FOLDED else f"{family}-{run.replace('cached', 'methods')}"


def command(
    artifact: str, checkpoint: Path, adapters: Path, compositions: Sequence[str], context: int
) -> list[str]:
    """The command that exports an artifact, without ``--out``."""
    family, way = family_of(artifact), way_of(artifact)
    common = ["--base", str(checkpoint), "--precision", "int4", "--context", str(context)]
    caliport = [sys.executable, "-P", "-m", "caliport", "export", *common]
    caliport += ["--runtime", "executorch"]
    if way == FOLDED:
        return [*caliport, "--adapter", str(adapters / family / compositions[0])]
    program = caliport if way == "methods" else [*child(str(__package__)), "inputs", *common]
    shared = needed(compositions) if family == "merged" else []
    return [
        *program,
        *(flag for name in shared for flag in ("--share", f"{name}={adapters}/adapters/{name}")),
        *(
            flag
            for name in compositions
            for flag in ("--bundle", f"{name}={adapters}/{family}/{name}")
        ),
    ]


def export(
    artifact: str,
    checkpoint: Path,
    adapters: Path,
    compositions: Sequence[str],
    out: Path,
    context: int,
    threads: int,
) -> Export:
    """Export and measure one artifact; a finished one with the same settings is kept.

    Args:
        artifact: One of ``ARTIFACTS``, written to ``out / artifact``.
        checkpoint: A directory from ``write_checkpoint``.
        adapters: A directory from ``write_adapters``.
        compositions: The compositions of the bundle.
        out: The directory of the run.
        context: Cache length in tokens.
        threads: Threads of PyTorch and OpenMP.

    Raises:
        InputError: The exporter failed.
    """
    key = read_manifest(adapters)["key"]
    directory, record = out / artifact, out / f"{artifact}.json"
    done = read_export(record)
    if done and (done.checkpoint, done.context, done.threads) == (key, context, threads):
        return done
    record.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
    usage = measured(
        [*command(artifact, checkpoint, adapters, compositions, context), "--out", str(directory)],
        out / f"{artifact}.log",
        environment={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
    )
    here = versions()
    done = Export(
        exporter=artifact,
        checkpoint=key,
        context=context,
        threads=threads,
        seconds=usage.seconds,
        peak_bytes=usage.peak_bytes,
        files=file_sizes(directory),
        versions={name: here[name] for name in SHOWN},
    )
    write_record(done, record)
    return done


def parts_of(artifact: str, out: Path, folded: int) -> dict[str, int]:
    """Bytes by part: base with its program, adapters, compositions' matrices, their programs.

    Args:
        artifact: One of ``ARTIFACTS``.
        out: The directory of the run.
        folded: Bytes of the folded program.
    """
    directory = out / artifact
    files = file_sizes(directory)
    if way_of(artifact) == "inputs":
        adapters, own = (
            sum(size for name, size in files.items() if name.startswith(f"{folder}/"))
            for folder in ("adapters", "compositions")
        )
        total = files[PROGRAM] + adapters + own
    else:
        sizes = read_manifest(directory)["lowering"].get("sizes", {})
        adapters, own = (sum(sizes.get(part, {}).values()) for part in ("adapters", "compositions"))
        total = files[PROGRAM]
    rest = total - folded - adapters - own
    return {"base": folded, "adapters": adapters, "own": own, "programs": rest, "total": total}
