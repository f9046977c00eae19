"""What the benchmark measures, as it stands in ``results.json``."""

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
        context: Tokens of the cache that it was asked for.
        threads: Threads it was given.
        seconds, peak_bytes: Wall time, and resident memory of the process tree at its highest.
        files: Bytes of every file of the artifact.
        versions: Of the packages that matter, in the exporter's own environment.
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
    """How fast an artifact runs.

    Attributes:
        exporter: Whose artifact.
        variant: How it was run, such as ``as written``; empty where there is one way.
        prefill, decode: Tokens a second in each round.
        cosine: Of its logits after the prompt with those of the float32 checkpoint.
    """

    exporter: str
    variant: str
    prefill: list[float]
    decode: list[float]
    cosine: float


class Results(Record):
    """All that a run found.

    Attributes:
        parameters: Of the checkpoint.
        context, prompt_tokens, new_tokens, threads: What was asked for.
        versions: Of the environment that ran the artifacts.
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
    """Write a record as JSON; the file appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def read_results(path: Path) -> Results:
    """Read ``results.json`` back.

    Raises:
        InputError: Missing, or not what this benchmark wrote.
    """
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; `python -m benchmarks.export run` first") from None
    except ValidationError as error:
        raise InputError(f"{path}: not results of this benchmark ({error})") from None


def read_export(path: Path) -> Export | None:
    """A finished export, or None where there is none that can be read."""
    try:
        return Export.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None
