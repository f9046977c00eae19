"""The measurements in ``results.json``."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from caliport.core.errors import InputError
from caliport.validation.records.record import Machine, Record

RESULTS = "results.json"


class Export(Record):
    """One finished export.

    Attributes:
        exporter: Its name in ``EXPORTERS``.
        checkpoint: Key of the checkpoint it was made from.
        context: Requested cache length in tokens.
        threads: Number of threads of the export.
        seconds, peak_bytes: Wall time, and peak resident memory of the process tree.
        files: Bytes of every file of the artifact.
        versions: Versions of the relevant packages in the exporter's environment.
    """

    exporter: str
    checkpoint: str
    context: int
    threads: int
    seconds: float
    peak_bytes: int
    files: dict[str, int]
    versions: dict[str, str]


class Speed(Record):
    """Speed of an artifact.

    Attributes:
        exporter: The exporter that made it.
        variant: How it was run, such as ``as written``; empty if there is only one way.
        prefill, decode: Tokens per second in each round.
        cosine: Cosine of its logits after the prompt with those of the float32 checkpoint.
    """

    exporter: str
    variant: str
    prefill: list[float]
    decode: list[float]
    cosine: float


class Results(Record):
    """All results of a run.

    Attributes:
        parameters: Number of the checkpoint's parameters.
        context, prompt_tokens, new_tokens, threads: The run's settings.
        versions: Package versions of the environment that ran the artifacts.
    """

    machine: Machine
    parameters: int
    context: int
    prompt_tokens: int
    new_tokens: int
    threads: int
    versions: dict[str, str]
    exports: dict[str, Export]
    speeds: list[Speed]


def write_record(record: Record, path: Path) -> None:
    """Write a record as JSON; the file appears complete or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def read_results(path: Path) -> Results:
    """Read ``results.json``.

    Raises:
        InputError: The file is missing or was not written by this benchmark.
    """
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run `python -m benchmarks.export run`") from None
    except ValidationError as error:
        raise InputError(f"{path}: not results of this benchmark ({error})") from None


def read_export(path: Path) -> Export | None:
    """Read a finished export; None if it is missing or unreadable."""
    try:
        return Export.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None
