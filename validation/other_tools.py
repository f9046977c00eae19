"""An artifact of another tool, or by another artifact: all that can be said without its recipe.

Nothing says how such an artifact was quantized, so there is no eager model that rounds as it does:
what lowering and quantization lost is judged together, against fp32.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from caliport.core.errors import InputError
from caliport.export.quantization.choices import Quantization
from caliport.validation.artifact import artifact_form, compositions_of, is_foreign
from caliport.validation.evaluation.evaluation import Answers, Evaluation, asked_of, runner_answers
from caliport.validation.evaluation.measures import NotFinite, compare
from caliport.validation.evaluation.prompts import TEXTS
from caliport.validation.gates import limits as gates
from caliport.validation.gates.limits import Limits
from caliport.validation.gates.lowering import one_by_one_apart
from caliport.validation.gates.verdict import (
    adapter_effect,
    check_vocabulary,
    samples_of,
    stock_of,
    task_of,
)
from caliport.validation.records.gate import Gate
from caliport.validation.records.reports import ArtifactResult, Findings, file_sizes
from caliport.validation.references import References
from caliport.validation.runners.open import PLAIN, open_runner
from caliport.validation.runners.runner import Runner


def validate_foreign(
    directory: Path,
    evaluation: Evaluation,
    *,
    reference: Answers,
    base: Answers | None,
    precision: str,
    limits: Limits,
    composition: str,
    threads: int = 1,
    metric: str = "rougeL",
    stock_examples: int = 4,
    bundled: str | None = None,
    runner: Runner | str = PLAIN,
) -> ArtifactResult:
    """Validate a ``.pte`` or an onnxruntime-genai directory, whatever tool made it.

    Args:
        directory: Holds one ``.pte``, or a ``genai_config.json`` and its graph.
        evaluation: What every model was asked.
        reference: What is right: answers of the fp32 composition, or of another artifact.
        base: Answers of the eager base; None where the artifact is the base itself.
        precision: What it is said to be; for the report.
        limits: Of that precision.
        composition: Its name in the report.
        threads: Of the runtime.
        metric: Task metric, where the evaluation has references.
        stock_examples: Prompts that the stock runner answers too.
        bundled: Of a bundle of ours, the composition to check; None for its base, or no bundle.
        runner: What runs it: a word of ``open_runner``, or any open runner.

    Returns:
        The measures, the gates and the verdict.

    Raises:
        InputError: Nothing that can be run, another vocabulary, or too short a context.
    """
    start = time.perf_counter()
    runtime, _ = artifact_form(directory)
    if isinstance(runner, str):
        runner = open_tried(directory, threads, bundled, runner)
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
        verdicts = [gates.stepwise_gate(stepwise, limits), *_tokenizer_gates(directory, evaluation)]
        adapter = None
        if base is not None:
            adapter = adapter_effect(base, reference, answers)
            verdicts.append(gates.adapter_gate(adapter, True, limits))
        task, verdict = task_of(evaluation, reference, answers, metric, limits)
        verdicts.append(verdict or gates.quantization_gate(total, limits))
        try:
            stock = stock_of(directory, runner, evaluation, answers, 0.0, stock_examples, bundled)
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
        composition=composition,
        method="another tool's" if is_foreign(directory) else "adapter",
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


def open_tried(directory: Path, threads: int, bundled: str | None, runner: str) -> Runner:
    """``open_runner``; a ``.pte`` that no manifest vouches for is first tried elsewhere.

    Raises:
        InputError: As ``open_runner``, or the program crashes its process.
    """
    if is_foreign(directory) and artifact_form(directory)[0] == "executorch" and runner == PLAIN:
        from caliport.validation.runners.executorch import try_elsewhere

        try_elsewhere(directory)
    return open_runner(directory, threads, bundled, runner)


def _tokenizer_gates(directory: Path, evaluation: Evaluation) -> list[Gate]:
    """Whether the tokenizer beside the program encodes as the base's; nothing where none is."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return []
    from tokenizers import Tokenizer

    try:
        theirs = Tokenizer.from_file(str(path))
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not a tokenizer ({line})") from None
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


@dataclass(frozen=True)
class Run:
    """An artifact and what runs it.

    Attributes:
        directory: Holds a ``.pte``, or a ``genai_config.json`` and its graph.
        runner: A word of ``caliport.validation.runners.open.open_runner``.
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
        InputError: See ``validate_foreign``; logits of ``against`` that are not
            finite.
    """
    from caliport.validation.gates.limits import limits_for

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
    bundled = against.bundled if compositions_of(against.directory) is not None else None
    runner = open_tried(against.directory, threads, bundled, against.runner)
    try:
        return runner_answers(runner, references.evaluation)
    except NotFinite as problem:
        raise InputError(f"{against.directory}: {problem}; expected a sound artifact") from None
