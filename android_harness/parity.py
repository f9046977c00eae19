"""Does an artifact compute on a device what it computes on this machine?

The host's runtime answers the prompts of an evaluation, the device's runner does so as a ``Job``,
and the two are compared: greedy tokens, the largest logits at every target, checksums of all of
them, and the task metric. Where processor and runtime are the host's, bits must be equal;
otherwise, what rounding alone does to the eager reference (``caliport.validation.gates.rounding``)
is the unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from caliport.android_harness.runners.by_runtime import runs_here_only
from caliport.android_harness.runners.job import Job, Prompt
from caliport.core.errors import InputError
from caliport.export import runtime as runtimes
from caliport.export.artifact import Artifact
from caliport.validation.evaluation import quality
from caliport.validation.evaluation.evaluation import Answers, Evaluation, runner_answers, texts_of
from caliport.validation.evaluation.measures import EXACT, compare, distances, spread, trace
from caliport.validation.gates import limits as gates
from caliport.validation.gates.limits import DEFAULTS, Limits, limits_for
from caliport.validation.records.device import DeviceResult, DeviceTask, DeviceUsed
from caliport.validation.records.gate import Gate, Measures
from caliport.validation.records.reports import shown_path
from caliport.validation.runners import engine
from caliport.validation.runners.open import Execution
from caliport.validation.runners.runner import Runner

if TYPE_CHECKING:
    from caliport.android_harness.device.adb import Device
    from caliport.android_harness.device.facts import Facts
    from caliport.android_harness.run import Ran
    from caliport.android_harness.runners.job import Row
    from caliport.validation.gates.rounding import Expected

TOP = 64
"""Logits that a device reports at each position."""
_RESOLVED = 1e-9  # probability of what a device does not report, below which float64 loses it
_UNMEASURED = 0.005  # of the logits' spread: rounding, where no reference of ours says how much


@dataclass(frozen=True)
class HostReference:
    """An artifact as it runs on this machine, which a device is compared with.

    Attributes:
        execution: The artifact and how it runs here; its threads are the device's too.
        evaluation: What is asked.
        runner: The artifact's, here.
        answers: Its answers.
        composition: Its name in reports.
        precision: Decides the limits.
        metric: Task metric, where the evaluation has references.
        expected: What rounding alone does to the eager reference; None where there is none.
        by_token: The eager reference's answers where it rounds as the runtime does on Arm
            (``Engine.arm_rounding``); None where that makes no difference.
    """

    execution: Execution
    evaluation: Evaluation
    runner: Runner
    answers: Answers
    composition: str
    precision: str
    metric: str
    expected: Expected | None = None
    by_token: Callable[[], Answers] | None = None

    @property
    def artifact(self) -> Artifact:
        """What runs."""
        return self.execution.artifact


def host_reference(
    execution: Execution,
    evaluation: Evaluation,
    *,
    composition: str,
    metric: str,
    expected: Expected | None = None,
    precision: str | None = None,
    by_token: Callable[[], Answers] | None = None,
) -> HostReference:
    """Open an artifact on this machine and let it answer; ``precision`` if no manifest says it.

    Raises:
        InputError: See ``Execution.open``, or a prompt that exceeds its context.
        NotFinite: Some logit is NaN or infinite.
    """
    runner = execution.open()
    return HostReference(
        execution,
        evaluation,
        runner,
        runner_answers(runner, evaluation),
        composition,
        precision or execution.artifact.precision,
        metric,
        expected,
        by_token,
    )


def job_of(host: HostReference, top: int = TOP) -> Job:
    """What a device is asked.

    Raises:
        InputError: The bundle has no such composition.
    """
    evaluation, artifact = host.evaluation, host.artifact
    return Job(
        runtime=artifact.runtime,
        directory="",
        adapter=engine.get(artifact.runtime).selector(artifact, host.execution.composition),
        threads=host.execution.threads,
        ends=tuple(sorted(evaluation.ends)),
        max_new_tokens=evaluation.max_new_tokens,
        top=top,
        prompts=tuple(
            Prompt(tokens=tuple(prompt), targets=tuple(target))
            for prompt, target in zip(evaluation.prompts, evaluation.targets, strict=True)
        ),
    )


def used(facts: Facts, *runners: str) -> DeviceUsed:
    """A device as reports record it, from its own properties and what runs on it."""
    found = facts.model_dump(include=set(DeviceUsed.model_fields))
    if any(map(runs_here_only, runners)):  # no phone has our environment
        found["kind"] = "linux"
    return DeviceUsed(**found)


def same_processor(device: Device) -> bool:
    """Whether a device has the processor of this machine, by what both kernels say.

    Raises:
        DeviceGone: It went away.
    """
    words = ("model name", "flags", "CPU implementer", "CPU part", "CPU variant", "Features")

    def said(text: str) -> set[str]:
        return {" ".join(line.split()) for line in text.splitlines() if line.startswith(words)}

    path = Path("/proc/cpuinfo")
    here = said(path.read_text(encoding="utf-8")) if path.is_file() else set()
    return bool(here) and here == said(device.script(f"cat {path}").out)


def check(host: HostReference, ran: Ran, same: bool) -> tuple[DeviceResult, Answers]:
    """Compare a device's answers with this machine's.

    Args:
        host: The artifact here.
        ran: What the device answered to ``job_of(host)``.
        same: Whether it has this machine's processor.

    Returns:
        The verdict, and the device's answers with its logits as ``estimated``.

    Raises:
        InputError: The result is of another vocabulary or leaves positions out.
    """
    artifact, ours, evaluation, said = (
        host.artifact,
        host.answers,
        host.evaluation,
        ran.result.answers,
    )
    _check_rows(ran, ours)
    found = Answers(
        f"{ran.result.runner} on {ran.device.serial}",
        [estimated(rows, a.rows) for rows, a in zip(ours.logits, said, strict=True)],
        [list(a.tokens or ()) for a in said],
    )
    version = metadata.version(runtimes.get(artifact.runtime).package)
    exact = same and ran.result.runtime_version == version
    limits = limits_for(host.precision)
    noise, rounding = rounding_of(host, ran.device.abi, exact, limits)
    apart = np.concatenate(
        [_distances(rows, a.rows) for rows, a in zip(ours.logits, said, strict=True)]
    )
    measures = compare(ours.logits, found.logits, evaluation.targets)
    tokens, identical, ties = _tokens_gate(host, found, limits.farthest * float(noise.max()))
    verdicts = [
        tokens,
        *gates.lowering_gates({"logits": measures}, rounding, measures, limits),
        *gates.rounding_gates({"logits": apart}, {"logits": noise}, limits),
    ]
    task, verdict = _task(host, found, limits)
    verdicts = [
        gate.model_copy(update={"stage": "device"})
        for gate in (*verdicts, *([verdict] if verdict else []))
    ]
    passed = all(gate.passed for gate in verdicts)
    return DeviceResult(
        composition=host.composition,
        runtime=artifact.runtime,
        precision=host.precision,
        bundle=artifact.is_bundle,
        path=shown_path(artifact, host.composition),
        device=used(ran.device, ran.result.runner),
        runner=ran.result.runner,
        runner_sha256=ran.runner_sha256,
        runtime_version=ran.result.runtime_version,
        host_version=version,
        exact=exact,
        threads=ran.result.threads,
        examples=len(evaluation.prompts),
        identical=identical,
        ties=ties,
        measures=measures,
        task=task,
        gates=verdicts,
        seconds=ran.seconds,
        passed=passed,
        lost_at=None if passed else "device",
    ), found


def estimated(host: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
    """A device's logits, from those that it reported and the host's.

    The others are the host's, shifted together so that the logarithm of the sum of exponentials is
    the reported one, but none above the least reported logit. Where none had to be cut, the KL from
    the host is that of the reported tokens and of the others as one: at most the true KL.

    Args:
        host: Logits [n, vocab].
        rows: n rows of the device.

    Returns:
        float64 [n, vocab].
    """
    found = host.astype(np.float64)
    for logits, row in zip(found, rows, strict=True):
        ids, known = list(row.ids), np.asarray(row.logits)
        others = np.ones(len(logits), dtype=bool)
        others[ids] = False
        left = 1 - float(np.exp(known - row.logsumexp).sum())
        if others.any() and left > _RESOLVED:
            rest = logits[others]
            ours = rest.max() + np.log(np.exp(rest - rest.max()).sum())
            logits[others] = np.minimum(rest + row.logsumexp + np.log(left) - ours, known[-1])
        logits[ids] = known
    return found


def _check_rows(ran: Ran, host: Answers) -> None:
    for number, (rows, said) in enumerate(zip(host.logits, ran.result.answers, strict=True)):
        where = f"device {ran.device.serial}: runner: answers.{number}"
        if said.tokens is None or len(said.rows) != len(rows):
            raise InputError(f"{where}: found {len(said.rows)} rows, expected {len(rows)} and text")
        tokens = [token for row in said.rows for token in row.ids] + list(said.tokens)
        if tokens and max(tokens) >= rows.shape[-1]:
            raise InputError(
                f"{where}: found token {max(tokens)}, expected 0 to {rows.shape[-1] - 1} as here"
            )


def _distances(host: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
    """Largest difference at each position, relative to the spread of the host's logits: [n].

    Of the logits that the device reported, of the mean of all of them and of their logsumexp.
    """
    wide = host.astype(np.float64)
    most = wide.max(axis=-1)
    sums = most + np.log(np.exp(wide - most[:, None]).sum(axis=-1))
    found = [
        max(
            float(np.abs(logits[list(row.ids)] - row.logits).max()),
            abs(float(logits.mean()) - row.mean),
            abs(float(total) - row.logsumexp),
        )
        for logits, total, row in zip(wide, sums, rows, strict=True)
    ]
    return np.maximum(np.asarray(found) / spread(wide), EXACT)


def rounding_of(
    host: HostReference, abi: str, exact: bool, limits: Limits
) -> tuple[np.ndarray, Measures]:
    """Distances that rounding alone makes on a device, and their measures over all positions."""
    expected = host.expected
    if expected is not None and not exact:
        if abi.startswith("arm") and host.by_token is not None:
            ours, theirs = expected.said.answers.logits, host.by_token().logits
            return distances(ours, theirs), compare(ours, theirs, host.evaluation.targets)
        # Prefill's also has sequences too short to meet much rounding.
        noise = expected.noise.get("decode", expected.noise["prefill"])
        return noise, expected.rounding
    kl = 0.0 if exact else limits.quantization_kl / 10 / limits.kl_times
    none = Measures(
        positions=1, max_abs=0.0, kl=kl, top1=1.0, perplexity=1.0, reference_perplexity=1.0
    )
    return np.asarray([EXACT if exact else _UNMEASURED]), none


def _tokens_gate(host: HostReference, found: Answers, tie: float) -> tuple[Gate, int, int]:
    """Greedy tokens against the host's; how many answers are identical, and how many near ties."""
    assert host.answers.generated is not None
    assert found.generated is not None
    pairs = list(zip(host.answers.generated, found.generated, strict=True))
    differ = [i for i, (ours, theirs) in enumerate(pairs) if ours != theirs]
    leads = [_lead(host, i, *pairs[i]) for i in differ]
    ties = sum(lead <= tie for lead in leads)
    identical = len(pairs) - len(differ)
    reason = f"{identical} of {len(pairs)} answers are the host's, token by token"
    if ties:
        reason += f", {ties} left it where the host was within rounding of a tie"
    if len(differ) > ties:
        reason += f", {len(differ) - ties} left it where the host was {max(leads):.2g} of the "
        reason += f"logits' spread ahead; {tie:.2g} is rounding"
    gate = Gate(
        name="greedy tokens",
        measure="answers that differ",
        limit=0,
        found=len(differ) - ties,
        passed=len(differ) == ties,
        stage="device",
        reason=reason,
    )
    return gate, identical, ties


def _lead(host: HostReference, index: int, ours: list[int], theirs: list[int]) -> float:
    """How far the host's token was ahead of the device's where they part, over the spread.

    Infinite where one of the two answers ends there: it has not the same end or room.
    """
    shared = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if shared is None:
        return float("inf")
    row = trace(host.runner, host.evaluation.prompts[index], ours[: shared + 1])[-1]
    return float(row[ours[shared]] - row[theirs[shared]]) / float(spread(row))


def _task(
    host: HostReference, found: Answers, limits: Limits
) -> tuple[DeviceTask | None, Gate | None]:
    """The task metric of host and device, paired; None each without references.

    Quantization is no part of the difference, so as much may be lost as of fp32.
    """
    evaluation = host.evaluation
    if evaluation.references is None:
        return None, None
    ours, theirs = (
        quality.metric(host.metric, texts_of(evaluation, side), evaluation.references)
        for side in (host.answers, found)
    )
    tight = replace(limits, margin=DEFAULTS["fp32"].margin)
    gate, interval = gates.task_gate(host.metric, ours, theirs, tight)
    here, there = float(np.mean(ours)), float(np.mean(theirs))
    task = DeviceTask(
        metric=host.metric,
        host=here,
        device=there,
        difference=there - here,
        interval=interval,
    )
    measure = f"{host.metric} difference from the host, points"
    return task, gate.model_copy(update={"measure": measure})
