"""An artifact of another tool against eager models: all that can be said without its recipe.

Nothing says how such an artifact was quantized, so there is no eager model that rounds as it does:
what lowering and quantization lost is judged together, against fp32.
"""

from __future__ import annotations

import time
from pathlib import Path

from caliport_core.errors import InputError
from validation import gates
from validation.evaluation import Answers, Evaluation, asked_of, runner_answers
from validation.gates import Gate, Limits
from validation.lowering import one_by_one_apart
from validation.parity import NotFinite, compare
from validation.results import ArtifactResult, Findings, file_sizes
from validation.runner import artifact_form, open_runner
from validation.validate import (
    adapter_effect,
    check_vocabulary,
    samples_of,
    stock_of,
    task_of,
)


def validate_foreign(
    directory: Path,
    evaluation: Evaluation,
    *,
    reference: Answers,
    base: Answers | None,
    precision: str,
    limits: Limits,
    threads: int = 1,
    metric: str = "rougeL",
    stock_examples: int = 4,
) -> ArtifactResult:
    """Validate a ``.pte`` or an onnxruntime-genai directory that has no manifest of ours.

    Args:
        directory: Holds one ``.pte``, or a ``genai_config.json`` and its graph.
        evaluation: What every model was asked.
        reference: What is right: answers of the fp32 composition, or of another artifact.
        base: Answers of the eager base; None where the artifact is the base itself.
        precision: What it is said to be; for the report.
        limits: Of that precision.
        threads: Of the runtime.
        metric: Task metric, where the evaluation has references.
        stock_examples: Prompts that the stock runner answers too.

    Returns:
        The measures, the gates and the verdict.

    Raises:
        InputError: Nothing that can be run, another vocabulary, or too short a context.
    """
    start = time.perf_counter()
    runtime, _ = artifact_form(directory)
    runner = open_runner(directory, threads)
    notes, stock = ["made by another tool: lowering and quantization are judged together"], None
    try:
        answers = runner_answers(runner, evaluation)
        check_vocabulary(answers, reference)
        stepwise = one_by_one_apart(runner, answers, evaluation)
    except NotFinite as problem:
        nothing = compare(reference.logits, reference.logits, evaluation.targets)
        findings = Findings(quantization=nothing, gates=[gates.unfinished(str(problem))])
    else:
        total = compare(reference.logits, answers.logits, evaluation.targets)
        verdicts: list[Gate] = [gates.stepwise_gate(stepwise, limits)]
        adapter = None
        if base is not None:
            adapter = adapter_effect(base, reference, answers)
            verdicts.append(gates.adapter_gate(adapter, True, limits))
        task, verdict = task_of(evaluation, reference, answers, metric, limits)
        verdicts.append(verdict or gates.quantization_gate(total, limits))
        try:
            stock = stock_of(directory, runner, evaluation, answers, 0.0, stock_examples, None)
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
            samples=samples_of(evaluation, reference, answers),
            gates=verdicts,
        )
    sizes = file_sizes(directory)
    return ArtifactResult(
        **dict(findings),
        composition=directory.name,
        method="another tool's",
        runtime=runtime,
        precision=precision,
        path=directory.name,
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
