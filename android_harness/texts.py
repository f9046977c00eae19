"""``.pte`` files on a device by the stock ``llama_main``: parity of texts, and times.

It reports neither tokens nor logits nor memory, so only greedy texts are compared with the host's.
"""

from __future__ import annotations

import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from caliport.android_harness.device.facts import artifact_files, check_abi, facts, obstacles
from caliport.android_harness.parity import HostReference, rounding_of, used
from caliport.android_harness.run import Ran
from caliport.android_harness.runners.executorch import llama_main_flags, parse_llama_main
from caliport.android_harness.runners.job import Result, Turn
from caliport.core.errors import InputError
from caliport.core.files import TOKENIZER, file_hash
from caliport.core.model_files.tokenizers import open_file
from caliport.export import runtime as runtimes
from caliport.export.artifact import Artifact
from caliport.validation.evaluation.evaluation import texts_of
from caliport.validation.gates.limits import limits_for
from caliport.validation.gates.verdict import clearness_of, is_plain
from caliport.validation.records.device import DeviceResult
from caliport.validation.records.gate import Gate
from caliport.validation.records.reports import shown_path

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from caliport.android_harness.device.facts import Facts
    from caliport.android_harness.device.session import Session
    from caliport.android_harness.runners.executorch import LlamaMain
    from caliport.android_harness.setup import DeviceSetup
    from caliport.validation.latency.workload import Candidate, Workload

NAME = "llama_main"
PROMPTS = 8
"""Most that are asked: the program is loaded anew for each."""
_LEAST = 5e-4  # seconds


def check_texts(held: Session, host: HostReference, program: Path, seconds: float) -> DeviceResult:
    """Compare the texts that ``llama_main`` writes on a device with the host's.

    Prompts and answers must be plain text (``caliport.validation.gates.verdict.is_plain``). A text
    that differs is no loss where the host was nearer a tie than rounding at one of its tokens.

    Args:
        held: The device.
        host: The artifact here.
        program: ``llama_main``, built for the device.
        seconds: The longest that each prompt may take.

    Raises:
        InputError: Nothing to ask, a program or artifact that does not suit the device, or one that
            fails there.
    """
    artifact, evaluation, answers = host.artifact, host.evaluation, host.answers
    texts, tokens = texts_of(evaluation, answers), answers.generated or []
    asked = [
        (i, text)
        for i, text in enumerate(evaluation.texts)
        if text is not None and is_plain(evaluation, tokens[i])
    ][:PROMPTS]
    if not asked:
        raise InputError(
            f"{artifact.directory}: no prompt with a plain text to compare llama_main on"
        )
    before, command, there = _brought(held, artifact, program)
    limits = limits_for(host.precision)
    noise, _ = rounding_of(host, "", False, limits)
    tie = limits.farthest * float(noise.max())
    same, ties, wrong = 0, 0, []
    started = time.monotonic()
    for index, text in asked:
        numbers = evaluation.max_new_tokens, host.execution.threads
        flags = llama_main_flags(*there, text, *numbers, host.execution.composition)
        found = _said(held, [command, *flags], text, seconds).text
        for special in evaluation.tokenizer.all_special_tokens:  # llama_main writes them
            found = found.replace(special, "")
        if found.strip() == texts[index]:
            same += 1
        elif clearness_of(host.runner, evaluation.prompts[index], tokens[index]) <= tie:
            ties += 1
        else:
            wrong.append(f"{found.strip()[:40]!r} for {texts[index][:40]!r}")
    reason = f"llama_main wrote {same} of {len(asked)} texts as this machine does"
    reason += f", {ties} others had a token within rounding of a tie" if ties else ""
    reason += f"; the first other: {wrong[0]}" if wrong else ""
    gate = Gate(
        name="greedy texts",
        measure="texts that differ",
        limit=0,
        found=len(wrong),
        passed=not wrong,
        stage="device",
        reason=reason,
    )
    return DeviceResult(
        composition=host.composition,
        runtime=artifact.runtime,
        precision=host.precision,
        bundle=artifact.is_bundle,
        path=shown_path(artifact, host.composition),
        device=used(before),
        runner=NAME,
        runner_sha256=file_hash(program),
        runtime_version=None,
        host_version=_version(artifact),
        exact=False,
        threads=host.execution.threads,
        examples=len(asked),
        identical=same,
        ties=ties,
        measures=None,
        task=None,
        gates=[gate],
        seconds=time.monotonic() - started,
        passed=gate.passed,
        lost_at=None if gate.passed else "device",
        notes=("llama_main reports no logits and no version: texts alone were compared",),
    )


def timed(
    held: Session, candidate: Candidate, program: Path, workload: Workload, setup: DeviceSetup
) -> Ran:
    """Time one answer after a prompt of each length, each in a process that has warmed up.

    The prompts are words, as many as give the tokens. Of the tokens after the first only their time
    together is reported, so each counts as long as the others; memory is not, and is 0. Times come
    in whole milliseconds: none counts as less than half of one.

    Raises:
        InputError: See ``check_texts``.
    """
    artifact, seconds = candidate.artifact, setup.seconds
    new_tokens, threads = workload.new_tokens, workload.threads
    before, command, there = _brought(held, artifact, program)
    tokenizer = open_file(artifact.directory / TOKENIZER)
    turns, loads = [], []
    started = time.monotonic()
    for length in setup.lengths:
        text = _text_of(tokenizer, length)
        flags = llama_main_flags(*there, text, new_tokens, threads, candidate.composition)
        said = _said(held, [command, *flags, "--warmup"], text, seconds)
        if said.decoded_tokens < 1:
            raise InputError(
                f"device {held.device.serial}: llama_main: ended after one token, expected "
                f"{new_tokens}; there is nothing to time"
            )
        each = max(said.decode_seconds, _LEAST) / said.decoded_tokens
        loads.append(max(said.load_seconds, _LEAST))
        turns.append(
            Turn(
                prompt_tokens=length,
                first_token_seconds=max(said.first_token_seconds, _LEAST),
                step_seconds=(each,) * said.decoded_tokens,
            )
        )
    result = Result(
        runner=NAME,
        runtime_version=_version(artifact),
        threads=threads,
        cores=(),
        load_seconds=loads[0],
        peak_bytes=0,
        loaded_bytes=0,
        idle_bytes=0,
        turns=tuple(turns),
    )
    took = time.monotonic() - started
    return Ran(result, before, facts(held.device), file_hash(program), took)


def _version(artifact: Artifact) -> str:
    """Of the runtime on this machine; ``llama_main`` does not report its own."""
    return metadata.version(runtimes.get(artifact.runtime).package)


def _text_of(tokenizer: Tokenizer, length: int) -> str:
    """Words of as many tokens, or of as few more as words can be."""
    count = 1
    while len(tokenizer.encode(" a" * count).ids) < length:
        count += 1
    return " a" * count


def _brought(
    held: Session, artifact: Artifact, program: Path
) -> tuple[Facts, str, tuple[str, str]]:
    """Push program and artifact; the device's state before, the program, ``.pte`` and tokenizer.

    Raises:
        InputError: One does not suit the device.
    """
    before = facts(held.device)
    reasons = obstacles(before, artifact)
    if reasons:
        raise InputError(f"{artifact.directory} on device {before.serial}: {reasons[0]}")
    check_abi(before, [program])
    command = f"{held.put({NAME: program})}/{NAME}"
    files = artifact_files(artifact)
    there = held.put(files)
    pte = next(name for name in files if name.endswith(".pte"))
    return before, command, (f"{there}/{pte}", f"{there}/{TOKENIZER}")


def _said(held: Session, command: list[str], prompt: str, seconds: float) -> LlamaMain:
    try:
        done = held.run(command, seconds)
    except TimeoutError:
        raise InputError(
            f"device {held.device.serial}: llama_main: no end after {seconds:g} s; it was stopped"
        ) from None
    if done.code:
        said = (done.err.strip().splitlines() or [f"exit code {done.code}"])[-1]
        raise InputError(f"device {held.device.serial}: {said[:300]}")
    return parse_llama_main((held.read("out") or b"").decode(errors="replace"), prompt)
