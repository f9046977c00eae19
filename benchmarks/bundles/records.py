"""The measurements in ``results.json``."""

from __future__ import annotations

from benchmarks.export.records import Export
from caliport.validation.records.record import Machine, Record


class Way(Record):
    """Measurements of one artifact.

    Attributes:
        load: Seconds from opening the program to the first token of its first composition, of each
            load.
        memory: Peak resident bytes with the first composition, after its first turn.
        more: Additional bytes for each further composition used, in the order of use.
        prefill, decode: Tokens per second in each turn.
        cold: Seconds to the first token of a composition on its first use, of each.
        warm: Seconds to the first token of a composition on later uses, of each.
    """

    load: list[float]
    memory: int
    more: list[int]
    prefill: list[float]
    decode: list[float]
    cold: list[float]
    warm: list[float]


class Parity(Record):
    """Agreement of the logits after the prompt between the two ways of one family.

    Attributes:
        difference: Maximum of |methods - inputs| over the maximum of |inputs|.
        cosine: The lowest cosine over the compositions that ran.
    """

    difference: float
    cosine: float


class Results(Record):
    """All results of a run.

    Attributes:
        parameters: Number of the checkpoint's parameters.
        context, prompt_tokens, new_tokens, threads: The run's settings.
        compositions: Number of compositions in each bundle.
        versions: Versions of packages.
        exports: Exports by artifact.
        parts: Bytes by artifact and part: ``base``, ``adapters``, ``own``, ``programs``, ``total``.
        ways: Measurements by family and ``exporting.RUNS``.
        parity: Parity by family.
    """

    machine: Machine
    parameters: int
    context: int
    prompt_tokens: int
    new_tokens: int
    threads: int
    compositions: int
    versions: dict[str, str]
    exports: dict[str, Export]
    parts: dict[str, dict[str, int]]
    ways: dict[str, dict[str, Way]]
    parity: dict[str, Parity]
