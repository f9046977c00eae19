"""Artifacts of other tools, and one artifact against another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from caliport.references import References
from export.artifact import Quantization

if TYPE_CHECKING:
    from validation.results import ArtifactResult


def check_foreign(
    directory: Path, references: References, precision: str, threads: int, against: Path | None
) -> ArtifactResult:
    """Hold an artifact of another tool, or of ours, to the fp32 composition or another artifact.

    Args:
        directory: Holds a ``.pte``, or a ``genai_config.json`` and its graph.
        references: Of the composition that it should be.
        precision: That decides the limits.
        threads: Of the runtime.
        against: The other artifact; None for eager fp32.

    Raises:
        InputError: See ``validation.foreign.validate_foreign``; logits of ``against`` that are not
            finite.
    """
    from caliport_core.errors import InputError
    from validation.evaluation import runner_answers
    from validation.foreign import validate_foreign
    from validation.gates import limits_for
    from validation.parity import NotFinite
    from validation.runner import open_runner

    runtime, fp32 = "executorch", Quantization("fp32")
    limits = limits_for(precision)
    if against is None:
        reference = references.answers(fp32, runtime)
    else:
        try:
            reference = runner_answers(open_runner(against, threads), references.evaluation)
        except NotFinite as problem:
            raise InputError(f"{against}: {problem}; expected a sound artifact") from None
    return validate_foreign(
        directory,
        references.evaluation,
        reference=reference,
        base=references.answers(fp32, runtime, alone=True) if references.adapter else None,
        precision=precision,
        limits=limits,
        threads=threads,
    )
