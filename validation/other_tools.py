"""Artifacts of another tool, and any artifact with another one as the reference.

Nothing records how another tool's artifact was quantized, so there is no eager model that rounds as
it does: lowering and quantization are judged together.
"""

from __future__ import annotations

import time

from caliport.core.errors import InputError
from caliport.core.files import TOKENIZER
from caliport.core.model_files.tokenizers import open_file
from caliport.export.artifact import Artifact
from caliport.validation.evaluation.evaluation import Answers, Evaluation, asked_of, runner_answers
from caliport.validation.evaluation.measures import NotFinite, compare
from caliport.validation.evaluation.prompts import TEXTS
from caliport.validation.gates import limits as gates
from caliport.validation.gates.criteria import Caption, Criteria
from caliport.validation.gates.limits import limits_for
from caliport.validation.gates.lowering import one_by_one_apart
from caliport.validation.gates.verdict import (
    adapter_effect,
    check_vocabulary,
    samples_of,
    stock_result,
    task_result,
)
from caliport.validation.records.gate import Gate
from caliport.validation.records.reports import ArtifactResult, Findings, file_sizes
from caliport.validation.references import FP32, EagerReferences
from caliport.validation.runners.open import Execution


def check_against(
    execution: Execution,
    references: EagerReferences,
    precision: str,
    against: Execution | None,
    caption: Caption,
) -> ArtifactResult:
    """Compare an artifact with the fp32 composition or with another artifact.

    Args:
        execution: The artifact and how to run it.
        references: Of the composition that it should be.
        precision: Decides the limits.
        against: The other artifact; None for eager fp32.
        caption: How the report shows it.

    Raises:
        InputError: See ``validate_against``; or logits of ``against`` that are not finite.
    """
    if against is None:
        reference = references.answers(FP32)
    else:
        reference = _reference_answers(against, references.evaluation)
    base = references.answers(FP32, alone=True) if references.adapter else None
    criteria = Criteria(references.evaluation, reference, base, limits_for(precision))
    return validate_against(execution, criteria, precision, caption)


def _reference_answers(against: Execution, evaluation: Evaluation) -> Answers:
    runner = against.open()
    try:
        return runner_answers(runner, evaluation)
    except NotFinite as problem:
        place = against.artifact.directory
        raise InputError(f"{place}: {problem}; expected a sound artifact") from None


def validate_against(
    execution: Execution, criteria: Criteria, precision: str, caption: Caption
) -> ArtifactResult:
    """Validate an artifact, whatever tool made it, against ``criteria.reference`` alone.

    Args:
        execution: The artifact and how to run it.
        criteria: What it is asked and compared with.
        precision: The artifact's, for the report.
        caption: How the report shows it.

    Returns:
        The measures, the gates and the verdict.

    Raises:
        InputError: Nothing that can be run, another vocabulary, or too short a context.
    """
    start = time.perf_counter()
    artifact, evaluation, limits = execution.artifact, criteria.evaluation, criteria.limits
    reference = criteria.reference
    runner = execution.open()
    notes, stock = [f"run by {runner.name}; lowering and quantization are judged together"], None
    try:
        check_vocabulary(runner, reference)
        answers = runner_answers(runner, evaluation)
        stepwise = one_by_one_apart(runner, answers, evaluation)
    except NotFinite as problem:
        nothing = compare(reference.logits, reference.logits, evaluation.targets)
        findings = Findings(quantization=nothing, gates=[gates.unfinished(str(problem))])
    else:
        total = compare(reference.logits, answers.logits, evaluation.targets)
        verdicts = [gates.stepwise_gate(stepwise, limits), *_tokenizer_gates(artifact, evaluation)]
        adapter = None
        if criteria.base is not None:
            adapter = adapter_effect(criteria.base, reference, answers)
            verdicts.append(gates.adapter_gate(adapter, True, limits))
        task, verdict = task_result(criteria, answers)
        verdicts.append(verdict or gates.quantization_gate(total, limits))
        try:
            stock = stock_result(execution, runner, criteria, answers, 0.0)
        except InputError as problem:
            notes.append(f"the stock runner was not tried: {problem}")
        if stock is not None:
            verdicts.append(gates.stock_gate(stock, limits))
        findings = Findings(
            one_by_one=stepwise,
            quantization=total,
            total=total,
            adapter=adapter,
            task=task,
            **samples_of(evaluation, reference, answers),
            gates=verdicts,
        )
    sizes = file_sizes(artifact.directory)
    return ArtifactResult(
        **dict(findings),
        composition=caption.composition,
        method=caption.method if artifact.is_ours else "another tool's",
        runtime=artifact.runtime,
        precision=precision,
        path=artifact.directory.name,
        bytes=sum(sizes.values()),
        files=sizes,
        examples=len(evaluation.prompts),
        asked=asked_of(evaluation),
        stock=stock,
        passed=all(gate.passed for gate in findings.gates),
        lost_at=gates.lost_at(findings.gates),
        seconds=time.perf_counter() - start,
        notes=tuple(notes),
    )


def _tokenizer_gates(artifact: Artifact, evaluation: Evaluation) -> list[Gate]:
    """Whether the tokenizer beside the program encodes as the base's; no gate without one."""
    path = artifact.directory / TOKENIZER
    if not path.is_file():
        return []
    theirs = open_file(path)
    differ = sum(
        theirs.encode(text, add_special_tokens=False).ids
        != evaluation.tokenizer.encode(text, add_special_tokens=False)
        for text in TEXTS
    )
    return [
        Gate(
            name="tokenizer",
            measure="texts that are encoded otherwise",
            limit=0,
            found=differ,
            passed=not differ,
            stage="packaging",
            reason=f"{differ} of {len(TEXTS)} texts are encoded otherwise than by the base's",
        )
    ]
