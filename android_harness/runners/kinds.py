"""Programs that take a ``Job`` on a device: how they are started, and what the host answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from caliport.android_harness.runners.job import Answer, Job, Row
from caliport.core.directories import MANIFEST, check_files, read_manifest
from caliport.core.errors import InputError
from caliport.validation.runners.runner import greedy

if TYPE_CHECKING:
    from caliport.validation.runners.runner import Runner

_PLACE = "{runner}"


@dataclass(frozen=True)
class JobRunner:
    """A program that takes a ``Job``.

    Attributes:
        runtime: Of the artifacts that it runs.
        directory: What must be on the device; None for a program that is there already.
        command: How it is started, ``{runner}`` being ``directory`` on the device.
    """

    runtime: str
    directory: Path | None
    command: tuple[str, ...]

    def started(self, place: str, job: str, result: str) -> list[str]:
        """The command when ``directory`` lies at ``place`` and the files are so named."""
        return [*(part.replace(_PLACE, place) for part in self.command), job, result]


def read_runner(directory: Path) -> JobRunner:
    """What ``caliport runner build`` made.

    Raises:
        InputError: Not such a directory, or not the files that its manifest records.
    """
    manifest = read_manifest(directory)
    if manifest.get("stage") != "runner":
        raise InputError(
            f"{directory / MANIFEST}: not of a runner; expected what caliport runner build made"
        )
    check_files(directory)
    return JobRunner(manifest["runtime"], directory, tuple(manifest["command"]))


def answers(runner: Runner, job: Job) -> tuple[Answer, ...]:
    """A runner's answers, in this process, to a job's prompts: what a device is compared with.

    Raises:
        InputError: A prompt or target that the runner refuses.
    """
    found = []
    for prompt in job.prompts:
        rows = []
        for i in range(len(prompt.targets)):
            read = runner.prefill(list(prompt.tokens)) if i == 0 else None
            logits = runner.step(prompt.targets[i - 1]) if read is None else read
            rows.append(row_of(logits, job.top))
        tokens = None
        if prompt.write:
            tokens = tuple(greedy(runner, list(prompt.tokens), job.max_new_tokens, job.ends))
        found.append(Answer(tokens=tokens, rows=tuple(rows)))
    return tuple(found)


def row_of(logits: np.ndarray, top: int) -> Row:
    """The ``Row`` of logits float32 [vocab].

    Raises:
        InputError: One is not finite.
    """
    if not np.isfinite(logits).all():
        raise InputError("logits: found one that is not finite, expected an artifact that computes")
    ids = np.argsort(-logits, kind="stable")[:top]
    wide = logits.astype(np.float64)
    largest = wide[ids[0]]
    return Row(
        ids=tuple(int(i) for i in ids),
        logits=tuple(float(x) for x in wide[ids]),
        mean=float(wide.mean()),
        logsumexp=float(largest + np.log(np.exp(wide - largest).sum())),
    )
