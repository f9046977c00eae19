"""Hold one artifact against eager models and decide whether accuracy survived."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from caliport.core.directories import read_manifest
from caliport.core.errors import InputError
from caliport.validation.artifact import artifact_form, compositions_of
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
from caliport.validation.gates.limits import Limits, limits_for
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
from caliport.validation.runners.open import PLAIN, open_runner, stock_gap, stock_generate
from caliport.validation.runners.runner import Runner

_SAMPLES = 8
_STOCK_NAMES = {"executorch": "TextLLMRunner", "onnx": "onnxruntime_genai"}


def validate_artifact(
    directory: Path,
    evaluation: Evaluation,
    *,
    quantized: Expected,
    fp32: Answers,
    base: Answers | None,
    graph: Expected | None = None,
    source: Source | None = None,
    composition: str,
    method: str,
    limits: Limits | None = None,
    threads: int = 1,
    metric: str = "rougeL",
    stock_examples: int = 4,
    bundled: str | None = None,
    runner: Runner | str = PLAIN,
    notes: Sequence[str] = (),
    heard: Callable[[Answers], None] | None = None,
) -> ArtifactResult:
    """Validate one artifact directory, or one composition of a bundle.

    Args:
        directory: Where the artifact and its manifest are.
        evaluation: What every model was asked.
        quantized: What the eager model in the artifact's own precision says, and what rounding
            does to that. Of a bundle: the quantized base with the composition beside it
            (``caliport.export.reference.beside.reference``).
        fp32: Answers of the eager fp32 composition.
        base: Answers of the eager base; None where the artifact is the base itself.
        graph: What the dequantized eager model says to ``few_of(evaluation)``, to check the graph
            of an ONNX artifact in float32; None leaves that out.
        source: What the artifact should be made from, to check what it holds and what travels
            with it; None leaves that out.
        composition: Its name in the report.
        method: The method that made it, for the report.
        limits: Default: those of the precision in the manifest.
        threads: Of the runtime.
        metric: Task metric, where the evaluation has references.
        stock_examples: Prompts that the stock runner answers too; 0 leaves it out.
        bundled: Of a bundle, the composition to check; None for its base alone.
        runner: What runs it: a word of ``open_runner``, or any open runner.
        notes: What is known not to be checked, for the report.
        heard: Is given what the artifact answers, unless its logits are not finite.

    Returns:
        The measures, every gate and the verdict. Logits that are not finite are a failed gate.

    Raises:
        InputError: No artifact, one its runtime cannot load, one with another vocabulary or too
            short a context, or a bundle without this composition.
    """
    start = time.perf_counter()
    runtime, precision = artifact_form(directory)
    limits = limits or limits_for(precision)
    if isinstance(runner, str):
        runner = open_runner(directory, threads, bundled, runner)
    findings, answers = check_runner(
        runner,
        evaluation,
        quantized=quantized,
        fp32=fp32,
        base=base,
        limits=limits,
        metric=metric,
    )
    if answers is not None and heard is not None:
        heard(answers)
    bundle = compositions_of(directory) is not None
    verdicts, stock = [*_held(directory, source, bundle), *findings.gates], None
    if graph is not None:
        verdicts += _graph(directory, evaluation, graph, limits, threads)
    gap = stock_gap(directory, bundled)
    if answers is not None and gap is None:
        noise = limits.farthest * max(float(part.max()) for part in quantized.noise.values())
        stock = stock_of(directory, runner, evaluation, answers, noise, stock_examples, bundled)
        if stock is not None:
            verdicts = [*verdicts, gates.stock_gate(stock, limits)]
    sizes = file_sizes(directory)
    parts, bits = _parts(directory, sum(sizes.values()))
    return ArtifactResult(
        **{**dict(findings), "gates": verdicts},
        composition=composition,
        method=method,
        runtime=runtime,
        precision=precision,
        path=shown_path(directory, composition, bundle),
        bytes=sum(sizes.values()),
        files=sizes,
        bundle=bundle,
        parts=parts,
        bits_per_weight=bits,
        examples=len(evaluation.prompts),
        asked=asked_of(evaluation),
        stock=stock,
        passed=all(gate.passed for gate in verdicts),
        lost_at=gates.lost_at(verdicts),
        seconds=time.perf_counter() - start,
        notes=(*notes, *([] if gap is None else [gap])),
    )


def _held(directory: Path, source: Source | None, bundle: bool) -> list[Gate]:
    """What the files themselves show, before anything is run."""
    if source is None:
        return []
    found = packaging_gates(directory, source.base)
    return found if bundle else [weights_gate(directory, source), *found]


def _graph(
    directory: Path, evaluation: Evaluation, graph: Expected, limits: Limits, threads: int
) -> list[Gate]:
    from caliport.validation.runners.onnx import OnnxRunner

    try:
        runner = OnnxRunner(directory, threads, float_activations=True)
        return check_graph(runner, few_of(evaluation), graph, limits)
    except NotFinite as problem:
        return [gates.unfinished(str(problem))]


def _parts(directory: Path, total: int) -> tuple[dict[str, int], float | None]:
    """Bytes by part and bits a weight, as the manifest counts them, and the bytes of the rest."""
    manifest = read_manifest(directory)
    sizes = dict(manifest.get("sizes", {}))
    sizes.pop("total", None)
    bits = sizes.pop("bits_per_weight", None)
    for kind, label in (("adapters", "shared adapters"), ("compositions", "compositions")):
        members = manifest.get("bundle", {}).get(kind, {})
        sizes[label] = sum(facts["bytes"] for facts in members.values())
    sizes["rest"] = max(0, total - sum(sizes.values()))
    return {part: size for part, size in sizes.items() if size}, bits


def check_runner(
    runner: Runner,
    evaluation: Evaluation,
    *,
    quantized: Expected,
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
    said = quantized.said.answers
    quantization = compare(fp32.logits, said.logits, evaluation.targets)
    try:
        check_vocabulary(runner, fp32)
        answers = runner_answers(runner, evaluation)
        lowering = check_lowering(runner, answers, evaluation, quantized, limits)
    except NotFinite as problem:
        return Findings(quantization=quantization, gates=[gates.unfinished(str(problem))]), None
    verdicts = lowering.gates
    adapter = None
    if base is not None:
        adapter = adapter_effect(base, fp32, answers)
        lowered = all(gate.passed for gate in verdicts)
        verdicts.append(gates.adapter_gate(adapter, lowered, limits))
    task, verdict = task_of(evaluation, fp32, answers, metric, limits)
    verdicts.append(verdict or gates.quantization_gate(quantization, limits))
    return Findings(
        lowering=lowering.overall,
        prefill=lowering.parts["prefill"],
        decode=lowering.parts.get("decode"),
        one_by_one=lowering.parts["one by one"],
        quantization=quantization,
        total=compare(fp32.logits, answers.logits, evaluation.targets),
        adapter=adapter,
        task=task,
        generation=_equal_share(said, answers),
        samples=samples_of(evaluation, fp32, answers),
        gates=verdicts,
    ), answers


def check_vocabulary(runner: Runner, fp32: Answers) -> None:
    """Raise ``InputError`` where an artifact's logits are not as many as the reference's.

    Before any token is read that a smaller vocabulary lacks.
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


def task_of(
    evaluation: Evaluation, fp32: Answers, answers: Answers, metric: str, limits: Limits
) -> tuple[TaskResult | None, Gate | None]:
    """The task metric and its gate; None each where no references say what is right."""
    if evaluation.references is None:
        return None, None
    ours, theirs = (
        quality.metric(metric, texts_of(evaluation, side), evaluation.references)
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
        fp32_scores=tuple(ours),
        artifact_scores=tuple(theirs),
    )
    return result, verdict


def stock_of(
    directory: Path,
    runner: Runner,
    evaluation: Evaluation,
    answers: Answers,
    noise: float,
    count: int,
    bundled: str | None,
) -> StockResult | None:
    """The stock runner's texts against ours; None where none can be compared.

    Prompts and answers must be plain text. The clearest answers of four times as many are asked
    for. One that differs where a token was nearer a tie than ``noise``, how far rounding moves
    logits relative to their spread, is not counted.
    """
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
            found = stock_generate(directory, text, evaluation.max_new_tokens, bundled)
        for special in evaluation.tokenizer.all_special_tokens:  # TextLLMRunner writes them
            found = found.replace(special, "")
        same = found.strip() == ours[i]
        matches += same
        doubtful += not same and clearness <= noise
    if doubtful == len(asked):
        return None
    runner_name = _STOCK_NAMES[artifact_form(directory)[0]]
    return StockResult(runner=runner_name, matches=matches, examples=len(asked) - doubtful)


def clearness_of(runner: Runner, prompt: list[int], answer: Sequence[int]) -> float:
    """How far ahead the written token was, at least, relative to the spread of the logits."""
    try:
        rows = trace(runner, prompt, answer)
    except NotFinite:
        return 0.0
    second, first = np.sort(rows, axis=-1)[:, -2:].T
    return float(((first - second) / spread(rows)).min())


def is_plain(evaluation: Evaluation, tokens: Sequence[int]) -> bool:
    """Whether there is text, every token of it whole characters, so that no stock runner stumbles.

    onnxruntime_genai 0.18 ends a text at a zero and at bytes that are no UTF-8, which is also what
    it writes for special tokens. The Python binding of executorch 1.5.1 raises UnicodeDecodeError
    for a token that is a part of a character, or a row of the embedding without a token.
    TextLLMRunner writes on where the first token is an end.
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


def samples_of(evaluation: Evaluation, fp32: Answers, answers: Answers) -> tuple[ParitySample, ...]:
    """A few examples to read, those where artifact and fp32 differ first."""
    reference, found = texts_of(evaluation, fp32), texts_of(evaluation, answers)
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
