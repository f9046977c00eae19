"""Compare one artifact with eager models and decide whether accuracy survived."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from caliport.core.errors import InputError
from caliport.core.progress import at
from caliport.export.artifact import Artifact
from caliport.validation.evaluation import quality
from caliport.validation.evaluation.evaluation import (
    Answers,
    Evaluation,
    asked_of,
    runner_answers,
    texts_of,
)
from caliport.validation.evaluation.measures import NotFinite, compare, kl_divergence, spread, trace
from caliport.validation.gates import limits as gates
from caliport.validation.gates.criteria import Caption, Criteria
from caliport.validation.gates.lowering import check_graph, check_lowering, few_of
from caliport.validation.gates.packaging import packaging_gates
from caliport.validation.gates.rounding import Expected
from caliport.validation.gates.weights import Source, weights_gate
from caliport.validation.records.gate import AdapterEffect, Gate, StockResult
from caliport.validation.records.reports import (
    ArtifactResult,
    Findings,
    ParitySample,
    TaskResult,
    file_sizes,
    shown_path,
)
from caliport.validation.runners import engine as engines
from caliport.validation.runners.open import Execution, stock_generate
from caliport.validation.runners.runner import Runner

_SAMPLES = 8


def validate_artifact(
    execution: Execution,
    criteria: Criteria,
    quantized: Expected,
    caption: Caption,
    *,
    graph: Expected | None = None,
    source: Source | None = None,
    answered: Callable[[Answers], None] | None = None,
) -> ArtifactResult:
    """Validate one artifact of ours, or one composition of a bundle, against eager models.

    Args:
        execution: The artifact and how to run it.
        criteria: What it is asked and compared with; the reference is the fp32 composition.
        quantized: Answers of the eager model in the artifact's own precision, and what rounding
            does to them. Of a bundle: the quantized base with the composition beside it
            (``caliport.export.reference.beside.reference``).
        caption: How the report shows it.
        graph: Answers of the dequantized eager model to ``few_of(criteria.evaluation)``, to check
            the program in float32 (``Engine.runs_in_float``); None skips that.
        source: What the artifact should be made from, to check its weights and the files beside
            the program; None skips that.
        answered: Called with the artifact's answers, unless its logits are not finite.

    Returns:
        The measures, every gate and the verdict. Logits that are not finite are a failed gate.

    Raises:
        InputError: An artifact that its runtime cannot load, another vocabulary, too short a
            context, or a bundle without this composition.
    """
    start = time.perf_counter()
    artifact, evaluation, limits = execution.artifact, criteria.evaluation, criteria.limits
    runner = execution.open()
    findings, answers = check_runner(runner, criteria, quantized)
    if answers is not None and answered is not None:
        answered(answers)
    verdicts, stock = [*_file_gates(artifact, source), *findings.gates], None
    if graph is not None:
        verdicts += _graph_gates(execution, criteria, graph)
    gap = engines.get(artifact.runtime).gap(execution.composition)
    if answers is not None and gap is None:
        at("asking the stock runtime")
        noise = limits.farthest * max(float(part.max()) for part in quantized.noise.values())
        stock = stock_result(execution, runner, criteria, answers, noise)
        if stock is not None:
            verdicts = [*verdicts, gates.stock_gate(stock, limits)]
    sizes = file_sizes(artifact.directory)
    parts, bits = _parts(artifact, sum(sizes.values()))
    return ArtifactResult(
        **{**dict(findings), "gates": verdicts},
        composition=caption.composition,
        method=caption.method,
        runtime=artifact.runtime,
        precision=artifact.precision,
        path=shown_path(artifact, caption.composition),
        bytes=sum(sizes.values()),
        files=sizes,
        bundle=artifact.is_bundle,
        parts=parts,
        bits_per_weight=bits,
        examples=len(evaluation.prompts),
        asked=asked_of(evaluation),
        stock=stock,
        passed=all(gate.passed for gate in verdicts),
        lost_at=gates.lost_at(verdicts),
        seconds=time.perf_counter() - start,
        notes=(*caption.notes, *([] if gap is None else [gap])),
    )


def _file_gates(artifact: Artifact, source: Source | None) -> list[Gate]:
    """What the files show without running anything."""
    if source is None:
        return []
    found = packaging_gates(artifact, source.base)
    return found if artifact.is_bundle else [weights_gate(artifact, source), *found]


def _graph_gates(execution: Execution, criteria: Criteria, graph: Expected) -> list[Gate]:
    artifact = execution.artifact
    at("asking the program in float32")
    try:
        runner = engines.get(artifact.runtime).open_float(artifact, execution.threads)
        return check_graph(runner, few_of(criteria.evaluation), graph, criteria.limits)
    except NotFinite as problem:
        return [gates.unfinished(str(problem))]


def _parts(artifact: Artifact, total: int) -> tuple[dict[str, int], float | None]:
    """Bytes by part and bits a weight, as the manifest counts them, and the bytes of the rest."""
    manifest = artifact.manifest
    sizes = dict(manifest.get("sizes", {}))
    sizes.pop("total", None)
    bits = sizes.pop("bits_per_weight", None)
    for kind, label in (("adapters", "shared adapters"), ("compositions", "compositions")):
        members = manifest.get("bundle", {}).get(kind, {})
        sizes[label] = sum(facts["bytes"] for facts in members.values())
    sizes["rest"] = max(0, total - sum(sizes.values()))
    return {part: size for part, size in sizes.items() if size}, bits


def check_runner(
    runner: Runner, criteria: Criteria, quantized: Expected
) -> tuple[Findings, Answers | None]:
    """Compare any runner with eager models; the arguments are those of ``validate_artifact``.

    Returns:
        The findings with their gates, and the runner's answers: None where its logits were not
        finite, which is a failed gate.
    """
    evaluation, fp32, limits = criteria.evaluation, criteria.reference, criteria.limits
    eager = quantized.said.answers
    quantization = compare(fp32.logits, eager.logits, evaluation.targets)
    try:
        check_vocabulary(runner, fp32)
        answers = runner_answers(runner, evaluation)
        lowering = check_lowering(runner, answers, evaluation, quantized, limits)
    except NotFinite as problem:
        return Findings(quantization=quantization, gates=[gates.unfinished(str(problem))]), None
    verdicts = lowering.gates
    adapter = None
    if criteria.base is not None:
        adapter = adapter_effect(criteria.base, fp32, answers)
        lowered = all(gate.passed for gate in verdicts)
        verdicts.append(gates.adapter_gate(adapter, lowered, limits))
    task, verdict = task_result(criteria, answers)
    verdicts += [verdict] if verdict is not None else []
    verdicts.append(gates.quantization_gate(quantization, limits))
    return Findings(
        lowering=lowering.overall,
        prefill=lowering.parts["prefill"],
        decode=lowering.parts.get("decode"),
        one_by_one=lowering.parts["one by one"],
        quantization=quantization,
        total=compare(fp32.logits, answers.logits, evaluation.targets),
        adapter=adapter,
        task=task,
        generation=_equal_share(eager, answers),
        **samples_of(evaluation, fp32, answers),
        gates=verdicts,
    ), answers


def check_vocabulary(runner: Runner, fp32: Answers) -> None:
    """Check that an artifact has as many logits as its reference.

    This comes before any token is read that a smaller vocabulary lacks.

    Raises:
        InputError: It has more or fewer.
    """
    found, expected = runner.prefill([0]).shape[-1], fp32.logits[0].shape[-1]
    if found != expected:
        raise InputError(
            f"{runner.name}: gives {found} logits but the base has {expected} tokens; this "
            "artifact was made from another base"
        )


def _equal_share(reference: Answers, found: Answers) -> float:
    pairs = list(zip(reference.generated or [], found.generated or [], strict=True))
    return sum(ours == theirs for ours, theirs in pairs) / len(pairs)


def adapter_effect(base: Answers, fp32: Answers, answers: Answers) -> AdapterEffect:
    """How far an artifact is from the base and from the composition."""
    return AdapterEffect(
        kl_base=_mean_kl(base, answers),
        kl_composition=_mean_kl(fp32, answers),
        effect=_mean_kl(base, fp32),
    )


def _mean_kl(reference: Answers, found: Answers) -> float:
    pairs = zip(reference.logits, found.logits, strict=True)
    return float(np.concatenate([kl_divergence(p, q) for p, q in pairs]).mean())


def task_result(criteria: Criteria, answers: Answers) -> tuple[TaskResult | None, Gate | None]:
    """The task metric and its gate; None each without reference texts."""
    evaluation, metric = criteria.evaluation, criteria.metric
    if evaluation.references is None:
        return None, None
    ours, theirs = (
        quality.metric(metric, texts_of(evaluation, side), evaluation.references)
        for side in (criteria.reference, answers)
    )
    verdict, interval = gates.task_gate(metric, ours, theirs, criteria.limits)
    means = float(np.mean(ours)), float(np.mean(theirs))
    result = TaskResult(
        metric=metric,
        fp32=means[0],
        artifact=means[1],
        difference=means[1] - means[0],
        interval=interval,
        fp32_scores=tuple(ours),
        artifact_scores=tuple(theirs),
    )
    return result, verdict


def stock_result(
    execution: Execution, runner: Runner, criteria: Criteria, answers: Answers, noise: float
) -> StockResult | None:
    """The stock runner's texts against ours; None where none can be compared.

    Prompts and answers must be plain text. Of four times as many prompts, those with the clearest
    answers are used. An answer that differs is not counted where one of its tokens was nearer a tie
    than ``noise``, which is how far rounding moves logits relative to their spread.
    """
    evaluation, count = criteria.evaluation, criteria.stock_examples
    ours, tokens = texts_of(evaluation, answers), answers.generated or []
    plain = [
        (i, text)
        for i, text in enumerate(evaluation.texts)
        if text is not None and is_plain(evaluation, tokens[i])
    ]
    known = [
        (clearness_of(runner, evaluation.prompts[i], tokens[i]), i, text)
        for i, text in plain[: 4 * count]
    ]
    asked = sorted(known, reverse=True)[:count]
    matches, doubtful = 0, 0
    for clearness, i, text in asked:
        found = "\ufffd"
        with contextlib.suppress(UnicodeDecodeError):  # see is_plain; ours is plain: no match
            found = stock_generate(
                execution.artifact, text, evaluation.max_new_tokens, execution.composition
            )
        for special in evaluation.tokenizer.all_special_tokens:  # TextLLMRunner writes them
            found = found.replace(special, "")
        same = found.strip() == ours[i]
        matches += same
        doubtful += not same and clearness <= noise
    if doubtful == len(asked):
        return None
    name = engines.get(execution.artifact.runtime).stock
    return StockResult(runner=name, matches=matches, examples=len(asked) - doubtful)


def clearness_of(runner: Runner, prompt: list[int], answer: Sequence[int]) -> float:
    """How far ahead the written token was, at least, relative to the spread of the logits."""
    try:
        rows = trace(runner, prompt, answer)
    except NotFinite:
        return 0.0
    second, first = np.sort(rows, axis=-1)[:, -2:].T
    return float(((first - second) / spread(rows)).min())


def is_plain(evaluation: Evaluation, tokens: Sequence[int]) -> bool:
    """Whether there is text whose every token is whole characters, as all stock runners need.

    onnxruntime_genai 0.18 ends a text at a zero and at bytes that are not UTF-8, which is also what
    it writes for special tokens. The Python binding of executorch 1.5.1 raises UnicodeDecodeError
    for a token that is a part of a character, or a row of the embedding without a token.
    TextLLMRunner goes on where the first token is an end.
    """
    tokenizer = evaluation.tokenizer
    body = tokens[:-1] if tokens and tokens[-1] in evaluation.ends else tokens
    ordinary = set(range(len(tokenizer))).difference(tokenizer.all_special_ids)
    return (
        bool(body)
        and ordinary.issuperset(body)
        and not {"\ufffd", "\0"}.intersection(
            "".join(quality.decode(tokenizer, [[t] for t in body]))
        )
    )


def samples_of(evaluation: Evaluation, fp32: Answers, answers: Answers) -> dict[str, Any]:
    """The first few examples to read, whatever was written, and the share of all that differs."""
    reference, found = texts_of(evaluation, fp32), texts_of(evaluation, answers)
    inputs = quality.decode(evaluation.tokenizer, evaluation.prompts[:_SAMPLES])
    samples = tuple(
        ParitySample(
            input=text,
            reference=evaluation.references[i] if evaluation.references else None,
            fp32=reference[i],
            artifact=found[i],
        )
        for i, text in enumerate(inputs)
    )
    differ = sum(ours != theirs for ours, theirs in zip(found, reference, strict=True))
    return {"samples": samples, "differing": differ / len(found)}
