"""What the benchmark measures, as it stands in ``results.json``."""

from __future__ import annotations

from benchmarks.export.records import Export
from caliport.validation.records.record import Machine, Record


class Way(Record):
    """One artifact as it ran.

    Attributes:
        load: Seconds from opening the program to the first token of its first composition, each.
        memory: Most resident bytes with the first composition, after its first turn.
        more: The same beyond that for each further composition used, in the order of use.
        prefill, decode: Tokens a second in each turn.
        cold: Seconds to the first token of a composition that was not used before, each.
        warm: The same of one used before, each.
    """

    load: list[float]
    memory: int
    more: list[int]
    prefill: list[float]
    decode: list[float]
    cold: list[float]
    warm: list[float]


class Parity(Record):
    """Logits after the prompt by the two ways of one family, over the compositions that ran.

    Attributes:
        difference: The largest of |methods - inputs| over the largest of |inputs|.
        cosine: The smallest.
    """

    difference: float
    cosine: float


class Results(Record):
    """All that a run found.

    Attributes:
        parameters: Of the checkpoint.
        context, prompt_tokens, new_tokens, threads: What was asked for.
        compositions: How many each bundle holds.
        versions: Of packages.
        exports: By artifact.
        parts: Bytes by artifact and part: ``base``, ``adapters``, ``own``, ``programs``, ``total``.
        ways: By family and ``exporting.RUNS``.
        parity: By family.
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
