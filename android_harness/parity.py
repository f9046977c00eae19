"""Does an artifact say on a device what it says on this machine?

The host's runtime answers the prompts of an evaluation, the device's runner does so as a ``Job``,
and the two are held together: greedy tokens, the largest logits at every target, checksums of all
of them, and the task metric. Where processor and runtime are the host's, bits are expected; else
what rounding alone does to the eager reference (``caliport.validation.gates.rounding``) is the
unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from caliport.android_harness.runners.job import Job, Prompt
from caliport.core.directories import read_manifest
from caliport.core.errors import InputError
from caliport.validation.artifact import artifact_form, compositions_of
from caliport.validation.evaluation import quality
from caliport.validation.evaluation.evaluation import Answers, Evaluation, runner_answers, texts_of
from caliport.validation.evaluation.measures import EXACT, compare, distances, spread, trace
from caliport.validation.gates import limits as gates
from caliport.validation.gates.limits import DEFAULTS, Limits, limits_for
from caliport.validation.records.device import DeviceResult, DeviceTask, DeviceUsed
from caliport.validation.records.gate import Gate, Measures
from caliport.validation.records.reports import shown_path
from caliport.validation.runners.open import open_runner
from caliport.validation.runners.runner import Runner

if TYPE_CHECKING:
    from caliport.android_harness.device.adb import Device
    from caliport.android_harness.device.facts import Facts
    from caliport.android_harness.run import Ran
    from caliport.android_harness.runners.job import Row
    from caliport.validation.gates.rounding import Expected

TOP = 64
"""Logits that a device tells at each position."""
_RESOLVED = 1e-9  # probability of what a device does not tell, below which float64 loses it
_UNMEASURED = 0.005  # of the logits' spread: rounding, where no reference of ours says how much
PACKAGES = {"onnx": "onnxruntime", "executorch": "executorch"}
"""What holds each runtime's version."""
_PYTHON = "caliport-executorch-python"


@dataclass(frozen=True)
class Subject:
    """An artifact on this machine, with what a device is held to.

    Attributes:
        directory: The artifact's.
        bundled: Of a bundle, the composition to run; None for its base alone.
        composition: Its name in reports.
        evaluation: What is asked.
        runner: The artifact's, here.
        answers: Its answers.
        expected: What rounding alone does to the eager reference; None where there is none.
        precision: That decides the limits.
        metric: Task metric, where the evaluation has references.
        threads: Of the runtime, here and there.
        by_token: The eager reference's answers where it rounds inputs by token, as ONNX Runtime
            does for 4-bit products on Arm (KleidiAI) and nowhere else; None where it makes no
            difference.
    """

    directory: Path
    bundled: str | None
    composition: str
    evaluation: Evaluation
    runner: Runner
    answers: Answers
    expected: Expected | None
    precision: str
    metric: str
    threads: int
    by_token: Callable[[], Answers] | None = None


def subject_of(
    directory: Path,
    evaluation: Evaluation,
    *,
    expected: Expected | None,
    composition: str,
    metric: str,
    threads: int,
    bundled: str | None = None,
    precision: str | None = None,
    by_token: Callable[[], Answers] | None = None,
) -> Subject:
    """Open an artifact on this machine and let it answer; ``precision`` if no manifest says it.

    Raises:
        InputError: See ``caliport.validation.runners.open.open_runner``, or a prompt that exceeds
            its context.
        NotFinite: Some logit is NaN or infinite.
    """
    runner = open_runner(directory, threads, bundled)
    answers = runner_answers(runner, evaluation)
    precision = precision or artifact_form(directory)[1]
    return Subject(
        directory,
        bundled,
        composition,
        evaluation,
        runner,
        answers,
        expected,
        precision,
        metric,
        threads,
        by_token,
    )


def adapter_of(directory: Path, bundled: str | None) -> str | None:
    """``Job.adapter`` of a composition of a bundle.

    Raises:
        InputError: The bundle has no such composition.
    """
    runtime, _ = artifact_form(directory)
    if bundled is None or runtime == "executorch":
        return bundled
    known = read_manifest(directory).get("bundle", {}).get("compositions", {})
    if bundled not in known:
        raise InputError(f"{directory}: has no composition {bundled!r}, only {', '.join(known)}")
    return str(known[bundled]["file"])


def job_of(subject: Subject, top: int = TOP) -> Job:
    """What a device is asked."""
    evaluation = subject.evaluation
    runtime, _ = artifact_form(subject.directory)
    return Job.model_validate(
        {
            "runtime": runtime,
            "directory": "",
            "adapter": adapter_of(subject.directory, subject.bundled),
            "threads": subject.threads,
            "ends": sorted(evaluation.ends),
            "max_new_tokens": evaluation.max_new_tokens,
            "top": top,
            "prompts": [
                Prompt(tokens=tuple(prompt), targets=tuple(target))
                for prompt, target in zip(evaluation.prompts, evaluation.targets, strict=True)
            ],
        }
    )


def used(facts: Facts, *runners: str) -> DeviceUsed:
    """A device as it is recorded, by what it says of itself and what runs on it."""
    found = facts.model_dump(include=set(DeviceUsed.model_fields))
    if any(runner.startswith(_PYTHON) for runner in runners):  # no phone has our environment
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


def check(subject: Subject, ran: Ran, same: bool) -> tuple[DeviceResult, Answers]:
    """Hold what a device said to what this machine says.

    Args:
        subject: The artifact here.
        ran: What the device answered to ``job_of(subject)``.
        same: Whether it has this machine's processor.

    Returns:
        The verdict, and the device's answers with its logits as ``estimated``.

    Raises:
        InputError: The result is of another vocabulary or leaves positions out.
    """
    runtime, _ = artifact_form(subject.directory)
    host, evaluation, said = subject.answers, subject.evaluation, ran.result.answers
    _check_rows(ran, host)
    found = Answers(
        f"{ran.result.runner} on {ran.device.serial}",
        [estimated(rows, a.rows) for rows, a in zip(host.logits, said, strict=True)],
        [list(a.tokens or ()) for a in said],
    )
    version = metadata.version(PACKAGES[runtime])
    exact = same and ran.result.runtime_version == version
    limits = limits_for(subject.precision)
    noise, rounding = rounding_of(subject, ran.device.abi, exact, limits)
    apart = np.concatenate(
        [_distances(rows, a.rows) for rows, a in zip(host.logits, said, strict=True)]
    )
    measures = compare(host.logits, found.logits, evaluation.targets)
    tokens, identical, ties = _tokens_gate(subject, found, limits.farthest * float(noise.max()))
    verdicts = [
        tokens,
        *gates.lowering_gates({"logits": measures}, rounding, measures, limits),
        *gates.rounding_gates({"logits": apart}, {"logits": noise}, limits),
    ]
    task, verdict = _task(subject, found, limits)
    verdicts = [
        gate.model_copy(update={"stage": "device"})
        for gate in (*verdicts, *([verdict] if verdict else []))
    ]
    passed = all(gate.passed for gate in verdicts)
    bundle = compositions_of(subject.directory) is not None
    return DeviceResult(
        composition=subject.composition,
        runtime=runtime,
        precision=subject.precision,
        bundle=bundle,
        path=shown_path(subject.directory, subject.composition, bundle),
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
    """A device's logits, from those that it told and the host's.

    The others are the host's, moved together so that the logarithm of the sum of exponentials is
    the one that the device told, but none above the least that it told. Where none had to be cut,
    the KL from the host is that of the told tokens and of the others as one: at most the true KL.

    Args:
        host: Logits [n, vocab].
        rows: n rows of the device.

    Returns:
        float64 [n, vocab].
    """
    found = host.astype(np.float64)
    for logits, row in zip(found, rows, strict=True):
        ids, told = list(row.ids), np.asarray(row.logits)
        others = np.ones(len(logits), dtype=bool)
        others[ids] = False
        left = 1 - float(np.exp(told - row.logsumexp).sum())
        if others.any() and left > _RESOLVED:
            rest = logits[others]
            ours = rest.max() + np.log(np.exp(rest - rest.max()).sum())
            logits[others] = np.minimum(rest + row.logsumexp + np.log(left) - ours, told[-1])
        logits[ids] = told
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

    Of the logits that the device told, of the mean of all of them and of their logsumexp.
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
    subject: Subject, abi: str, exact: bool, limits: Limits
) -> tuple[np.ndarray, Measures]:
    """Distances that rounding alone makes on a device, and their measures over all positions."""
    expected = subject.expected
    if expected is not None and not exact:
        if abi.startswith("arm") and subject.by_token is not None:
            ours, theirs = expected.said.answers.logits, subject.by_token().logits
            return distances(ours, theirs), compare(ours, theirs, subject.evaluation.targets)
        # Prefill's also has sequences too short to meet much rounding.
        noise = expected.noise.get("decode", expected.noise["prefill"])
        return noise, expected.rounding
    kl = 0.0 if exact else limits.quantization_kl / 10 / limits.kl_times
    none = Measures(
        positions=1, max_abs=0.0, kl=kl, top1=1.0, perplexity=1.0, reference_perplexity=1.0
    )
    return np.asarray([EXACT if exact else _UNMEASURED]), none


def _tokens_gate(subject: Subject, found: Answers, tie: float) -> tuple[Gate, int, int]:
    """Greedy tokens against the host's; how many answers are identical, and how many near ties."""
    assert subject.answers.generated is not None
    assert found.generated is not None
    pairs = list(zip(subject.answers.generated, found.generated, strict=True))
    differ = [i for i, (ours, theirs) in enumerate(pairs) if ours != theirs]
    leads = [_lead(subject, i, *pairs[i]) for i in differ]
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


def _lead(subject: Subject, index: int, ours: list[int], theirs: list[int]) -> float:
    """How far the host's token was ahead of the device's where they part, over the spread.

    Infinite where one of the two answers ends there: it has not the same end or room.
    """
    shared = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if shared is None:
        return float("inf")
    row = trace(subject.runner, subject.evaluation.prompts[index], ours[: shared + 1])[-1]
    return float(row[ours[shared]] - row[theirs[shared]]) / float(spread(row))


def _task(
    subject: Subject, found: Answers, limits: Limits
) -> tuple[DeviceTask | None, Gate | None]:
    """The task metric of host and device, paired; None each without references.

    Quantization is no part of the difference, so as much may be lost as of fp32.
    """
    evaluation = subject.evaluation
    if evaluation.references is None:
        return None, None
    ours, theirs = (
        quality.metric(subject.metric, texts_of(evaluation, side), evaluation.references)
        for side in (subject.answers, found)
    )
    tight = replace(limits, margin=DEFAULTS["fp32"].margin)
    gate, interval = gates.task_gate(subject.metric, ours, theirs, tight)
    host, device = float(np.mean(ours)), float(np.mean(theirs))
    task = DeviceTask(
        metric=subject.metric,
        host=host,
        device=device,
        difference=device - host,
        interval=interval,
    )
    measure = f"{subject.metric} difference from the host, points"
    return task, gate.model_copy(update={"measure": measure})
