"""One example in the terminal: what was asked, and what each method and artifact wrote."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from caliport.core.errors import printable
from caliport.core.progress import PlainConsole

if TYPE_CHECKING:
    from caliport.validation.records.reports import (
        ArtifactResult,
        CompositionResult,
        ParityReport,
        QualityReport,
        QualitySample,
    )

_WIDTH, _LONGEST = 76, 600
_METHODS = ("zero-shot", "linear")
"""Shown beside the one that ships."""


def show_example(quality: QualityReport, parity: ParityReport | None) -> None:
    """The first composition's first example, as the base, the merge, what ships and artifacts do.

    The example is the first of those that are reported, whatever was written.
    """
    console = PlainConsole()
    for name, result in list(quality.compositions.items())[:1]:
        for sample in result.samples[:1]:
            console.print(Text(f"{name}: the first of the {result.examples} examples"))
            rows = [("asked", sample.input), ("expected", sample.reference)]
            rows += [*_of_methods(result, sample), *_of_artifacts(name, sample, parity)]
            for head, text in rows:
                lines = textwrap.wrap(printable(text, _LONGEST), _WIDTH) or ["(nothing)"]
                console.print(Text(f"  {head}", "bold"))
                for line in lines:
                    console.print(Text(f"    {line}"))


def _of_methods(result: CompositionResult, sample: QualitySample) -> Iterator[tuple[str, str]]:
    labels = {method.method: method.label for method in result.methods}
    for method in dict.fromkeys((*_METHODS, result.best)):
        if method in sample.outputs:
            yield labels[method], sample.outputs[method]


def _of_artifacts(
    composition: str, sample: QualitySample, parity: ParityReport | None
) -> Iterator[tuple[str, str]]:
    """The smallest of each runtime, where it was asked the same."""
    smallest: dict[str, ArtifactResult] = {}
    for one in parity.artifacts if parity is not None else ():
        if one.composition == composition and one.samples:
            found = smallest.get(one.runtime)
            smallest[one.runtime] = one if found is None or one.bytes < found.bytes else found
    for one in smallest.values():
        for answer in one.samples:
            if answer.reference == sample.reference and sample.input in answer.input:
                yield f"{one.runtime} {one.form}", answer.artifact
                break
