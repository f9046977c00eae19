"""Gates: a measure, its limit, and the reason for the limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from caliport.core.errors import InputError
from caliport.validation.evaluation.bootstrap import bootstrap_interval
from caliport.validation.evaluation.measures import unexplained
from caliport.validation.records.gate import AdapterEffect, Gate, Measures, StockResult

_SAME = 1e-6
_GRAPH_FARTHEST = 10.0  # a sound artifact of SmolLM2-135M-Instruct was at 4.04 in one of 192 texts
WEIGHTS = "weights"
_NO_EFFECT = 1e-7  # nats; a composition this near the base has no adapter to look for


@dataclass(frozen=True)
class Limits:
    """What a sound artifact of one precision stays within.

    Attributes:
        max_abs: Lowering: largest difference of two logits from the quantized eager model; None
            where activations are quantized at run time, since one rounding that falls the other
            way moves single logits by a whole quantization step.
        kl: Lowering: mean KL from the quantized eager model, nats, that is always allowed.
        kl_times: Lowering: or so many times the KL that rounding alone makes (see
            ``caliport.validation.gates.rounding``), if that is more.
        apart: Lowering: multiple of rounding noise still treated as noise, at each position.
        unexplained: Lowering: share of positions that rounding does not explain.
        farthest: Lowering: distance of the farthest position over the farthest that rounding
            alone makes.
        top1: Lowering: share of positions with the same favourite token. One flip is always
            allowed, since a tie has no right answer.
        flips_times: Lowering: or so many times the flips that rounding alone makes, if more.
        adapter_ratio: The artifact's KL from the composition over its KL from the base. 0 is the
            composition itself; over 1 is nearer to the base: the adapter is missing.
        margin: Quantization: points (0 to 100) of the task metric that may be lost against fp32.
        quantization_kl: Quantization: mean KL from fp32, nats. At most a third of it is called
            kept, more weakened, more than it damaged.
        stock: Share of prompts where the stock runner writes the same text as ours.
        confidence: Of the bootstrap interval.
    """

    max_abs: float | None
    kl: float
    top1: float
    adapter_ratio: float
    margin: float
    quantization_kl: float
    stock: float
    kl_times: float = 5.0
    flips_times: float = 2.0
    apart: float = 3.0
    unexplained: float = 0.2
    farthest: float = 4.0
    confidence: float = 0.95


DEFAULTS = {
    # float32 sums in another order: differences of 1e-5 to 1e-4 on logits of order 10.
    "fp32": Limits(1e-3, 1e-6, 0.99, 0.5, 0.5, 1e-4, 1.0),
    "int8": Limits(None, 1e-7, 0.95, 0.5, 2.0, 0.1, 0.75),
    # KL of 0.15 nats: models of the field that people use at 4 bits stay below it (llama.cpp's
    # Q4_K_M and IQ4_NL of 8B models lie at 0.01 to 0.05), and one that was rounded carelessly does
    # not (docs/results.md, quantization).
    "int4": Limits(None, 1e-7, 0.95, 0.5, 5.0, 0.15, 0.75),
}
"""Limits for each precision."""


def limits_for(precision: str, **changes: float | None) -> Limits:
    """The default limits of a precision, with some of them changed.

    Raises:
        InputError: Unknown precision or limit.
    """
    if precision not in DEFAULTS:
        raise InputError(
            f"precision {precision!r} has no limits, expected one of {', '.join(DEFAULTS)}"
        )
    known = [field.name for field in fields(Limits)]
    for name in changes:
        if name not in known:
            raise InputError(f"limit {name!r} is not known, expected one of {', '.join(known)}")
    return replace(DEFAULTS[precision], **changes)  # type: ignore[arg-type]


def unfinished(problem: str) -> Gate:
    """The failure of an artifact whose logits cannot be measured."""
    return Gate(
        name="finite logits",
        measure="NaN or infinite logits",
        limit=0,
        found=None,
        passed=False,
        stage="lowering",
        reason=problem,
    )


def lowering_gates(
    parts: dict[str, Measures], rounding: Measures, overall: Measures, limits: Limits
) -> list[Gate]:
    """Artifact against the quantized eager model: one KL gate a part, and top-1 agreement.

    Args:
        parts: Measures by what was run, such as ``prefill`` and ``decode``.
        rounding: The jittered quantized eager model against itself.
        overall: All parts together.
        limits: Of the precision.
    """
    bound = max(limits.kl, limits.kl_times * rounding.kl)
    why = (
        f"rounding alone makes {rounding.kl:.3g}; {limits.kl_times:g} times that, or {limits.kl:g}"
    )
    gates = [
        _at_most(part, "KL in nats", bound, m.kl, stage="lowering", why=why)
        for part, m in parts.items()
    ]
    if limits.max_abs is not None:
        why = "float32 sums in another order move a logit by less"
        found = max(m.max_abs for m in parts.values())
        gates.append(
            _at_most(
                "largest difference", "max abs", limits.max_abs, found, stage="lowering", why=why
            )
        )
    flips = round((1 - overall.top1) * overall.positions)
    share = max(1 - limits.top1, limits.flips_times * (1 - rounding.top1))
    allowed = max(1, math.floor(share * overall.positions))
    gates.append(
        Gate(
            name="favourite tokens",
            measure="top-1 agreement",
            limit=limits.top1,
            found=overall.top1,
            passed=flips <= allowed,
            stage="lowering",
            reason=f"{flips} of {overall.positions} favourite tokens differ, {allowed} may: near "
            "ties fall either way",
        )
    )
    return gates


def rounding_gates(
    found: Mapping[str, np.ndarray],
    noise: Mapping[str, np.ndarray],
    limits: Limits,
    graph: bool = False,
) -> list[Gate]:
    """Artifact against the quantized eager model, position by position, in units of rounding.

    Args:
        found: Distances from the reference (``caliport.validation.gates.rounding.distances``) by
            what was run.
        noise: Those that rounding alone makes; at least one part, ``found`` may have more.
        limits: Of the precision.
        graph: Whether both round no activations. Then a few short texts are tens of times as
            sensitive as the median one, and the order of sums moves them farther than noise does.
    """
    what, most_times = ("graph: ", _GRAPH_FARTHEST) if graph else ("", limits.farthest)
    gates = [
        _at_most(
            f"{what}{part}, position by position",
            "share of positions that rounding does not explain",
            limits.unexplained,
            unexplained(found[part], distances, limits.apart),
            stage="lowering",
            why=f"half of them are {np.median(found[part]):.2g} of the logits' spread off or more, "
            f"{np.median(distances):.2g} by rounding alone",
        )
        for part, distances in noise.items()
    ]
    most = max(float(distances.max()) for distances in noise.values())
    worst = {part: float(distances.max()) for part, distances in found.items()}
    part = max(worst, key=lambda name: worst[name])
    farthest = _at_most(
        f"{what}farthest position",
        "distance over the largest that rounding makes",
        most_times,
        worst[part] / most,
        stage="lowering",
        why=f"in {part}, {worst[part]:.2g} of the logits' spread, by rounding alone {most:.2g}",
    )
    return [*gates, farthest]


def forgetting_gate(difference: float) -> Gate:
    """The same tokens before and after a whole context must give the same logits."""
    return _at_most(
        "forgetting",
        "max abs",
        _SAME,
        difference,
        stage="lowering",
        why="what was read before must leave nothing behind",
    )


def stepwise_gate(stepwise: Measures, limits: Limits) -> Gate:
    """Where nothing tells how an artifact rounds: its prefill must equal its own single steps.

    Rounding differs between the two, so it may cost a tenth of what quantization may.
    """
    return _at_most(
        "one by one",
        "KL in nats",
        limits.quantization_kl / 10,
        stepwise.kl,
        stage="lowering",
        why="a prompt fed token by token must give what its prefill gives",
    )


def adapter_gate(adapter: AdapterEffect, lowered: bool, limits: Limits) -> Gate:
    """Is the adapter really in the artifact: nearer to the composition than to the base?

    Args:
        adapter: The distances.
        lowered: Whether the lowering gates passed; decides which stage a failure is attributed to.
        limits: Of the precision.
    """
    passed, stage = True, "adapter"
    ratio = adapter.kl_composition / max(adapter.kl_base, 1e-12)
    reason = (
        f"KL {adapter.kl_composition:.2g} nats from the composition, {adapter.kl_base:.2g} from "
        "the base; an artifact without its adapter is the base"
    )
    if adapter.effect < _NO_EFFECT:
        ratio = 0.0
        reason = "the composition equals the base: there is no adapter to find"
    elif ratio > limits.adapter_ratio:
        passed = False
        if adapter.kl_base > adapter.effect / 2:  # far from both: something else is broken
            stage = "quantization" if lowered else "lowering"
    return Gate(
        name="adapter is in there",
        measure="KL from the composition / KL from the base",
        limit=limits.adapter_ratio,
        found=ratio,
        passed=passed,
        stage=stage,
        reason=reason,
    )


def task_gate(
    metric: str, fp32: Sequence[float], artifact: Sequence[float], limits: Limits
) -> tuple[Gate, tuple[float, float]]:
    """Non-inferiority on the task metric, by a paired bootstrap over examples.

    Passes where the whole interval of the mean difference lies above minus the margin, fails
    where it lies below. In between there are too few examples to say, and the gate tells how
    many would be enough if the spread stays what it is.

    Args:
        metric: Its name, for the reason.
        fp32: Score of each example in fp32, 0 to 100.
        artifact: Score of the same examples by the artifact.
        limits: Of the precision.

    Returns:
        The gate and the interval of the difference (artifact - fp32), in points.
    """
    differences = np.asarray(artifact, dtype=np.float64) - np.asarray(fp32, dtype=np.float64)
    low, high = bootstrap_interval(differences, limits.confidence)
    mean = float(differences.mean())
    shown, lost = low >= -limits.margin, high < -limits.margin
    reason = (
        f"{metric} changed by {mean:+.2f} points, {limits.confidence:.0%} interval {low:+.2f} to "
        f"{high:+.2f}; {limits.margin:g} points may be lost"
    )
    if not shown and not lost:
        width = (mean - low) if mean > -limits.margin else (high - mean)
        gap = abs(mean + limits.margin)
        enough = math.ceil(len(differences) * (width / gap) ** 2) if gap > 0.01 else None
        wanted = f"about {enough} examples" if enough else "many more examples"
        reason += f"; {len(differences)} examples are too few to say, {wanted} would be enough"
    gate = Gate(
        name="task quality",
        measure=f"{metric} difference from fp32, points",
        limit=-limits.margin,
        found=mean,
        passed=not lost,
        decided=shown or lost,
        stage="quantization",
        reason=reason,
    )
    return gate, (low, high)


def quantization_gate(quantization: Measures, limits: Limits) -> Gate:
    """Quantized eager against fp32: the distribution itself must survive, whatever a task scores.

    KL and share of equal favourites say more than a task's score, which stays equal as long as
    gains and losses balance (https://arxiv.org/abs/2407.09141).
    """
    limit, found = limits.quantization_kl, quantization.kl
    word = "kept" if found <= limit / 3 else "weakened" if found <= limit else "damaged"
    ratio = quantization.perplexity / quantization.reference_perplexity
    return _at_most(
        "next-token distribution",
        "KL in nats",
        limit,
        found,
        stage="quantization",
        why=f"{word}: {quantization.top1:.1%} the same favourite token as fp32, perplexity "
        f"{ratio:.3g} times fp32's",
    )


def stock_gate(stock: StockResult, limits: Limits) -> Gate:
    """The runtime's own runner must write what ours writes: tokenizer, template and ends agree."""
    return Gate(
        name="stock runner",
        measure="share of equal texts",
        limit=limits.stock,
        found=stock.matches / stock.examples,
        passed=stock.matches >= limits.stock * stock.examples,
        stage="packaging",
        reason=f"{stock.runner} wrote {stock.matches} of {stock.examples} texts as our runner did",
    )


def lost_at(gates: Sequence[Gate]) -> str | None:
    """The stage that lost the accuracy, or None where every gate passed.

    A failure early on makes later checks fail too, so the most specific stage is named. Weights
    that are not those asked for explain all else. Then a missing adapter comes before lowering,
    lowering before quantization, packaging last.
    """
    failed = {gate.stage for gate in gates if not gate.passed}
    known = [gate.stage for gate in gates if gate.name == WEIGHTS and not gate.passed]
    if known:
        return known[0]
    order = ("adapter", "lowering", "quantization", "packaging")
    return next((stage for stage in order if stage in failed), None)


def _at_most(name: str, measure: str, limit: float, found: float, *, stage: str, why: str) -> Gate:
    return Gate(
        name=name,
        measure=measure,
        limit=limit,
        found=found,
        passed=found <= limit,
        stage=stage,
        reason=f"found {found:.3g}, at most {limit:.3g}: {why}",
    )
