"""An artifact against its eager reference, in units of the rounding that any correct one has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from caliport.core.progress import at
from caliport.validation.evaluation.evaluation import Answers, Evaluation
from caliport.validation.evaluation.measures import compare, distances, one_by_one, trace
from caliport.validation.evaluation.probes import again, runner_echo
from caliport.validation.gates import limits as gates
from caliport.validation.gates.limits import Limits
from caliport.validation.gates.rounding import Expected, Said, apart
from caliport.validation.records.gate import Gate, Measures
from caliport.validation.runners.runner import Runner

_STEPWISE_PROMPTS = 4
_GRAPH_PROMPTS, _GRAPH_TARGETS = 8, 8


@dataclass(frozen=True)
class Lowering:
    """What lowering changed: measures by what was run, all of them together, and the gates."""

    parts: dict[str, Measures]
    overall: Measures
    gates: list[Gate]


def check_lowering(
    runner: Runner, answers: Answers, evaluation: Evaluation, expected: Expected, limits: Limits
) -> Lowering:
    """Compare a runner with its eager reference on prompts and probes.

    Args:
        runner: Of the artifact.
        answers: What it said to the prompts.
        evaluation: The prompts and targets.
        expected: What it should say, and what rounding does to that.
        limits: Of the precision.

    Raises:
        NotFinite: Some logit is NaN or infinite.
    """
    quantized, targets = expected.said.answers, evaluation.targets
    parts = {"prefill": _part(quantized, answers, targets, slice(0, 1))}
    if any(len(target) > 1 for target in targets):
        parts["decode"] = _part(quantized, answers, targets, slice(1, None))
    at("asking token by token")
    parts["one by one"] = one_by_one_apart(runner, answers, evaluation)
    overall = compare(quantized.logits, answers.logits, targets)
    found = _found(expected, Said(answers, runner_echo(runner, expected.probes)))
    fresh, later = again(runner, expected.probes)
    verdicts = [
        *gates.lowering_gates(parts, expected.rounding, overall, limits),
        *gates.rounding_gates(found, expected.noise, limits),
        gates.forgetting_gate(float(np.abs(fresh - later).max())),
    ]
    return Lowering(parts, overall, verdicts)


def check_graph(
    runner: Runner, evaluation: Evaluation, expected: Expected, limits: Limits
) -> list[Gate]:
    """Compare a program that multiplies in float32 with the dequantized eager model.

    Without the rounding of activations only the order of sums differs, so the graph and its
    weights are checked as tightly as an fp32 artifact's.

    Args:
        runner: Of ``Engine.open_float``.
        evaluation: As ``few_of`` gives it.
        expected: What the dequantized eager model says to it.
        limits: Of the precision.

    Raises:
        NotFinite: Some logit is NaN or infinite.
    """
    pairs = zip(evaluation.prompts, evaluation.targets, strict=True)
    answers = Answers(runner.name, [trace(runner, *pair) for pair in pairs], None)
    found = _found(expected, Said(answers, runner_echo(runner, expected.probes)))
    return gates.rounding_gates(found, expected.noise, limits, graph=True)


def few_of(evaluation: Evaluation) -> Evaluation:
    """An evaluation with some of the prompts: enough for a graph, whose every part they use."""
    few = slice(None, None, -(-len(evaluation.prompts) // _GRAPH_PROMPTS))
    targets = [target[:_GRAPH_TARGETS] for target in evaluation.targets[few]]
    return replace(evaluation, prompts=evaluation.prompts[few], targets=targets)


def _found(expected: Expected, said: Said) -> dict[str, np.ndarray]:
    full = distances([expected.said.echo.full], [said.echo.full])
    return apart(expected.said, said) | {"full context": full}


def _part(
    reference: Answers, found: Answers, targets: Sequence[Sequence[int]], rows: slice
) -> Measures:
    return compare(
        [logits[rows] for logits in reference.logits],
        [logits[rows] for logits in found.logits],
        [target[rows] for target in targets],
    )


def one_by_one_apart(runner: Runner, answers: Answers, evaluation: Evaluation) -> Measures:
    """A few prompts fed token by token against the artifact's own prefill of them."""
    order = sorted(range(len(evaluation.prompts)), key=lambda i: len(evaluation.prompts[i]))
    shorter = order[: len(order) // 2 + 1]  # a step a token: long prompts would take minutes
    few = shorter[:: max(1, len(shorter) // _STEPWISE_PROMPTS)]
    stepwise = [one_by_one(runner, evaluation.prompts[i])[None] for i in few]
    whole = [answers.logits[i][:1] for i in few]
    return compare(whole, stepwise, [evaluation.targets[i][:1] for i in few])
