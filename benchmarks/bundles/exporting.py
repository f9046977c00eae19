"""The artifacts: one folded, and a bundle of each family by each way."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bundles.adapters import FAMILIES, needed
from benchmarks.bundles.speed import PROGRAM
from benchmarks.export.measuring import measured
from benchmarks.export.records import Export, read_export, write_record
from caliport.core.directories import read_manifest, versions
from caliport.validation.records.reports import file_sizes

FOLDED = "folded"
WAYS = ("methods", "inputs")
RUNS = (FOLDED, "methods", "cached", "inputs")
"""What runs of each family; ``cached`` are the methods, with packed weights shared."""
ARTIFACTS = (FOLDED, *(f"{family}-{way}" for family in FAMILIES for way in WAYS))
SHOWN = ("executorch", "torch", "torchao", "transformers")


def way_of(artifact: str) -> str:
    """``folded``, ``methods`` or ``inputs``."""
    return artifact.rpartition("-")[2]


def family_of(artifact: str) -> str:
    """One of ``FAMILIES``; the folded artifact is of the first."""
    return artifact.partition("-")[0] if artifact != FOLDED else FAMILIES[0]


def artifact_of(family: str, run: str) -> str:
    """The artifact that is run."""
    return FOLDED if run == FOLDED else f"{family}-{run.replace('cached', 'methods')}"


def command(
    artifact: str, checkpoint: Path, adapters: Path, compositions: Sequence[str], context: int
) -> list[str]:
    """What exports an artifact but for ``--out``."""
    family, way = family_of(artifact), way_of(artifact)
    common = ["--base", str(checkpoint), "--precision", "int4", "--context", str(context)]
    caliport = [sys.executable, "-m", "caliport", "export", *common, "--runtime", "executorch"]
    if way == FOLDED:
        return [*caliport, "--adapter", str(adapters / family / compositions[0])]
    program = (
        caliport if way == "methods" else [sys.executable, "-m", __package__, "inputs", *common]
    )
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
    """Make and measure one artifact; a finished one of the same settings is kept.

    Args:
        artifact: In ``ARTIFACTS``; becomes ``out / artifact``.
        checkpoint: A directory of ``write_checkpoint``.
        adapters: A directory of ``write_adapters``.
        compositions: What the bundle holds.
        out: The directory of the run.
        context: Tokens of the cache.
        threads: What PyTorch and OpenMP are told to use.

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
    """Bytes by part: the base with its program, the adapters, the matrices of the compositions,
    and all else, which is their programs.

    Args:
        artifact: In ``ARTIFACTS``.
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
