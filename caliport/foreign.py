"""Artifacts of other tools, and one artifact against another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from caliport.references import References
from export.artifact import Quantization

if TYPE_CHECKING:
    from validation.evaluation import Answers
    from validation.results import ArtifactResult


@dataclass(frozen=True)
class Run:
    """An artifact and what runs it.

    Attributes:
        directory: Holds a ``.pte``, or a ``genai_config.json`` and its graph.
        runner: A word of ``validation.runner.open_runner``.
        bundled: Of a bundle, the composition to run; None for its base. It says nothing where the
            directory is no bundle.
    """

    directory: Path
    runner: str = "plain"
    bundled: str | None = None


def check_foreign(
    run: Run,
    references: References,
    precision: str,
    threads: int,
    against: Run | None,
    *,
    composition: str,
) -> ArtifactResult:
    """Hold an artifact of another tool, or of ours, to the fp32 composition or another artifact.

    Args:
        run: The artifact.
        references: Of the composition that it should be.
        precision: That decides the limits.
        threads: Of the runtime.
        against: The other artifact; None for eager fp32.
        composition: Its name in the report.

    Raises:
        InputError: See ``validation.foreign.validate_foreign``; logits of ``against`` that are not
            finite.
    """
    from validation.foreign import validate_foreign
    from validation.gates import limits_for

    runtime, fp32 = "executorch", Quantization("fp32")
    limits = limits_for(precision)
    if against is None:
        reference = references.answers(fp32, runtime)
    else:
        reference = _answers(against, references, threads)
    return validate_foreign(
        run.directory,
        references.evaluation,
        reference=reference,
        base=references.answers(fp32, runtime, alone=True) if references.adapter else None,
        precision=precision,
        limits=limits,
        composition=composition,
        threads=threads,
        bundled=run.bundled,
        runner=run.runner,
    )


def _answers(against: Run, references: References, threads: int) -> Answers:
    from caliport_core.errors import InputError
    from validation.evaluation import runner_answers
    from validation.foreign import open_tried
    from validation.parity import NotFinite
    from validation.runner import compositions_of

    bundled = against.bundled if compositions_of(against.directory) is not None else None
    runner = open_tried(against.directory, threads, bundled, against.runner)
    try:
        return runner_answers(runner, references.evaluation)
    except NotFinite as problem:
        raise InputError(f"{against.directory}: {problem}; expected a sound artifact") from None
