"""Run one export: prepare and measure it, or keep a finished one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from benchmarks.export.environments import installed
from benchmarks.export.exporters import EXPORTERS, Job, fresh, interpreter
from benchmarks.export.measuring import measured
from benchmarks.export.records import Export, read_export, write_record
from caliport.core.directories import read_manifest
from caliport.validation.records.reports import file_sizes


def export(
    name: str, checkpoint: Path, out: Path, context: int, threads: int, peers: Path
) -> tuple[Export, bool]:
    """Export and measure one artifact; a finished one with the same settings is kept.

    Args:
        name: One of ``EXPORTERS``.
        checkpoint: A directory from ``write_checkpoint``.
        out: The directory of the run; ``NAME`` in it is the artifact, ``NAME.json`` the
            measurements, ``NAME.log`` the exporter's output.
        context: Cache length in tokens.
        threads: Threads of PyTorch and OpenMP.
        peers: The directory of the peers' environments.

    Returns:
        The measurements, and whether the export was made now.

    Raises:
        InputError: The exporter failed.
    """
    key = read_manifest(checkpoint)["key"]
    checkpoint, out, peers = checkpoint.resolve(), out.resolve(), peers.absolute()
    artifact, record = out / name, out / f"{name}.json"
    done = read_export(record)
    if done and (done.checkpoint, done.context, done.threads) == (key, context, threads):
        return done, False
    record.unlink(missing_ok=True)
    shutil.rmtree(artifact, ignore_errors=True)
    work = fresh(out / f"{name}.work")
    job = Job(checkpoint, artifact, work, context, interpreter(name, peers))
    exporter = EXPORTERS[name]
    exporter.prepare(job)
    log = out / f"{name}.log"
    usage = measured(exporter.command(job), log, cwd=work, environment=_environment(threads))
    shutil.rmtree(work)
    done = Export(
        exporter=name,
        checkpoint=key,
        context=context,
        threads=threads,
        seconds=usage.seconds,
        peak_bytes=usage.peak_bytes,
        files=file_sizes(artifact),
        versions=installed(name, peers),
    )
    write_record(done, record)
    return done, True


def _environment(threads: int) -> dict[str, str]:
    """This process's environment variables, without its modules and with networking disabled."""
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**ours, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
