"""Hold one artifact against eager models and decide whether accuracy survived."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from caliport_core.errors import InputError
from validation import gates, quality
from validation.evaluation import Answers, Evaluation, runner_answers
from validation.gates import AdapterEffect, Gate, Limits, StockResult, limits_for
from validation.parity import Measures, NotFinite, compare, kl_divergence, one_by_one
from validation.results import (
    ArtifactResult,
    Findings,
    ParitySample,
    TaskResult,
    file_sizes,
)
from validation.runner import Runner, artifact_form, open_runner, stock_generate

_SAMPLES = 8
_STEPWISE_PROMPTS = 4
_STOCK_NAMES = {"executorch": "TextLLMRunner", "onnx": "onnxruntime_genai"}


def validate_artifact(
    directory: Path,
    evaluation: Evaluation,
    *,
    quantized: Answers,
    fp32: Answers,
    base: Answers | None,
    composition: str,
    method: str,
    limits: Limits | None = None,
    threads: int = 1,
    metric: str = "rougeL",
    stock_examples: int = 4,
) -> ArtifactResult:
    """Validate one artifact directory.

    Args:
        directory: Where the artifact and its manifest are.
        evaluation: What every model was asked.
        quantized: Answers of the eager model in the artifact's own precision; for an fp32
            artifact the same as ``fp32``.
        fp32: Answers of the eager fp32 composition.
        base: Answers of the eager base; None where the artifact is the base itself.
        composition: Its name in the report.
        method: The method that made it, for the report.
        limits: Default: those of the precision in the manifest.
        threads: Of the runtime.
        metric: Task metric, where the evaluation has references.
        stock_examples: Prompts that the stock runner answers too; 0 leaves it out.

    Returns:
        The measures, every gate and the verdict. Logits that are not finite are a failed gate.

    Raises:
        InputError: No artifact, one its runtime cannot load, or one with another vocabulary or
            too short a context.
    """
    start = time.perf_counter()
    runtime, precision = artifact_form(directory)
    limits = limits or limits_for(precision)
    runner = open_runner(directory, threads)
    findings, answers = check_runner(
        runner,
        evaluation,
        quantized=quantized,
        fp32=fp32,
        base=base,
        limits=limits,
        metric=metric,
    )
    verdicts, stock = findings.gates, None
    if answers is not None:
        stock = _stock(directory, runtime, evaluation, answers, stock_examples)
        if stock is not None:
            verdicts = [*verdicts, gates.stock_gate(stock, limits)]
    sizes = file_sizes(directory)
    return ArtifactResult(
        **{**dict(findings), "gates": verdicts},
        composition=composition,
        method=method,
        runtime=runtime,
        precision=precision,
        path=f"{composition}/{directory.name}",
        bytes=sum(sizes.values()),
        files=sizes,
        examples=len(evaluation.prompts),
        stock=stock,
        passed=all(gate.passed for gate in verdicts),
        lost_at=gates.lost_at(verdicts),
        seconds=time.perf_counter() - start,
    )


def check_runner(
    runner: Runner,
    evaluation: Evaluation,
    *,
    quantized: Answers,
    fp32: Answers,
    base: Answers | None,
    limits: Limits,
    metric: str = "rougeL",
) -> tuple[Findings, Answers | None]:
    """Hold any runner against eager models; the arguments are those of ``validate_artifact``.

    Returns:
        The findings with their gates, and what the runner answered: None where its logits were
        not finite, which is a failed gate.
    """
    quantization = compare(fp32.logits, quantized.logits, evaluation.targets)
    try:
        answers = runner_answers(runner, evaluation)
        stepwise = _one_by_one(runner, answers, evaluation)
    except NotFinite as problem:
        return Findings(quantization=quantization, gates=[gates.unfinished(str(problem))]), None
    _check_vocabulary(answers, fp32)
    targets = evaluation.targets
    parts = {"prefill": _part(quantized, answers, targets, slice(0, 1))}
    if any(len(target) > 1 for target in targets):
        parts["decode"] = _part(quantized, answers, targets, slice(1, None))
    lowering = compare(quantized.logits, answers.logits, targets)
    verdicts = gates.lowering_gates(
        {**parts, "one by one": stepwise}, quantization, lowering, limits
    )
    adapter = None
    if base is not None:
        adapter = _adapter_effect(base, fp32, answers)
        lowered = all(gate.passed for gate in verdicts)
        verdicts.append(gates.adapter_gate(adapter, lowered, limits))
    task, verdict = _task(evaluation, fp32, answers, metric, limits)
    verdicts.append(verdict or gates.quantization_gate(quantization, limits))
    return Findings(
        **parts,
        lowering=lowering,
        one_by_one=stepwise,
        quantization=quantization,
        total=compare(fp32.logits, answers.logits, targets),
        adapter=adapter,
        task=task,
        generation=_equal_share(quantized, answers),
        samples=_samples(evaluation, fp32, answers),
        gates=verdicts,
    ), answers


def _check_vocabulary(answers: Answers, fp32: Answers) -> None:
    found, expected = answers.logits[0].shape[-1], fp32.logits[0].shape[-1]
    if found != expected:
        raise InputError(
            f"{answers.name}: gives {found} logits but the base has {expected} tokens; this "
            "artifact was made from another base"
        )


def _equal_share(reference: Answers, found: Answers) -> float:
    pairs = list(zip(reference.generated or [], found.generated or [], strict=True))
    return sum(ours == theirs for ours, theirs in pairs) / len(pairs)


def _part(
    reference: Answers, found: Answers, targets: Sequence[Sequence[int]], rows: slice
) -> Measures:
    return compare(
        [logits[rows] for logits in reference.logits],
        [logits[rows] for logits in found.logits],
        [target[rows] for target in targets],
    )


def _one_by_one(runner: Runner, answers: Answers, evaluation: Evaluation) -> Measures:
    """A few prompts fed token by token against the artifact's own prefill of them."""
    order = sorted(range(len(evaluation.prompts)), key=lambda i: len(evaluation.prompts[i]))
    shorter = order[: len(order) // 2 + 1]  # a step a token: long prompts would take minutes
    few = shorter[:: max(1, len(shorter) // _STEPWISE_PROMPTS)]
    stepwise = [one_by_one(runner, evaluation.prompts[i])[None] for i in few]
    whole = [answers.logits[i][:1] for i in few]
    return compare(whole, stepwise, [evaluation.targets[i][:1] for i in few])


def _adapter_effect(base: Answers, fp32: Answers, answers: Answers) -> AdapterEffect:
    return AdapterEffect(
        kl_base=_mean_kl(base, answers),
        kl_composition=_mean_kl(fp32, answers),
        effect=_mean_kl(base, fp32),
    )


def _mean_kl(reference: Answers, found: Answers) -> float:
    pairs = zip(reference.logits, found.logits, strict=True)
    return float(np.concatenate([kl_divergence(p, q) for p, q in pairs]).mean())


def _task(
    evaluation: Evaluation, fp32: Answers, answers: Answers, metric: str, limits: Limits
) -> tuple[TaskResult | None, Gate | None]:
    if evaluation.references is None:
        return None, None
    ours, theirs = (
        quality.metric(metric, _texts(evaluation, side), evaluation.references)
        for side in (fp32, answers)
    )
    verdict, interval = gates.task_gate(metric, ours, theirs, limits)
    means = float(np.mean(ours)), float(np.mean(theirs))
    result = TaskResult(
        metric=metric,
        fp32=means[0],
        artifact=means[1],
        difference=means[1] - means[0],
        interval=interval,
    )
    return result, verdict


def _texts(evaluation: Evaluation, answers: Answers) -> list[str]:
    assert answers.generated is not None
    return quality.decode(evaluation.tokenizer, answers.generated)


def _stock(
    directory: Path, runtime: str, evaluation: Evaluation, answers: Answers, count: int
) -> StockResult | None:
    """The stock runner's texts against ours; None where no prompt or no answer is plain text."""
    ours = _texts(evaluation, answers)
    plain = [_is_plain(evaluation, tokens) for tokens in answers.generated or []]
    texts = enumerate(evaluation.texts)
    asked = [(text, ours[i]) for i, text in texts if text is not None and plain[i]][:count]
    if not asked:
        return None
    matches = 0
    for text, answer in asked:
        with contextlib.suppress(UnicodeDecodeError):  # see _is_plain; ours is plain: no match
            found = stock_generate(directory, text, evaluation.max_new_tokens)
            for special in evaluation.tokenizer.all_special_tokens:  # TextLLMRunner writes them
                found = found.replace(special, "")
            matches += found.strip() == answer
    return StockResult(runner=_STOCK_NAMES[runtime], matches=matches, examples=len(asked))


def _is_plain(evaluation: Evaluation, tokens: Sequence[int]) -> bool:
    """Whether every token is whole characters by itself, so that no stock runner stumbles.

    onnxruntime_genai 0.18 ends a text at bytes that are no UTF-8, and the Python binding of
    executorch 1.5.1 raises UnicodeDecodeError for a token that is a part of a character.
    """
    return not any(
        "\ufffd" in piece for piece in quality.decode(evaluation.tokenizer, [[t] for t in tokens])
    )


def _samples(evaluation: Evaluation, fp32: Answers, answers: Answers) -> tuple[ParitySample, ...]:
    """A few examples to read, those where artifact and fp32 differ first."""
    reference, found = _texts(evaluation, fp32), _texts(evaluation, answers)
    order = sorted(range(len(found)), key=lambda i: reference[i] == found[i])[:_SAMPLES]
    inputs = quality.decode(evaluation.tokenizer, [evaluation.prompts[i] for i in order])
    return tuple(
        ParitySample(
            input=text,
            reference=evaluation.references[i] if evaluation.references else None,
            fp32=reference[i],
            artifact=found[i],
        )
        for i, text in zip(order, inputs, strict=True)
    )
