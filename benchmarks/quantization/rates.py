"""Decode and prefill rates: all artifacts loaded at once, a turn each in every round.

Finished rounds are kept, so that a killed run goes on where it was. Of each round, a row's rate is
compared with its baseline's in the same round.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.export.speed import Turn
from benchmarks.export.turns import PAUSE, Course, Process, Worker, with_threads
from benchmarks.quantization.llama import WORKER
from benchmarks.quantization.peers import interpreter
from benchmarks.quantization.records import read, write
from benchmarks.quantization.rows import BASELINES, ROWS
from caliport.core.errors import InputError

RECORD = "rates.json"


class LlamaWorker(Worker):
    """A worker process with a ``.gguf``."""

    def __init__(self, directory: Path, course: Course, peers: Path) -> None:
        numbers = map(str, (course.threads, course.prompt, course.new_tokens))
        arguments = ["turns", str(directory / "model.gguf"), *numbers]
        python = (interpreter("llama.cpp", peers), "-P")
        Process.__init__(self, str(WORKER), arguments, directory, course.threads, python)
        self.logits = np.array(self.answer(), np.float32)
        self.turns: list[Turn] = []


def run(names: Sequence[str], out: Path, peers: Path, course: Course) -> dict[str, str]:
    """Take turns until ``course.rounds`` are done, and keep them in ``rates.json``.

    Args:
        names: Rows with an artifact in ``out``.
        out: The directory of the run.
        peers: The directory of the tools' environments.
        course: The work of a turn, the threads and the number of rounds.

    Returns:
        Reasons of rows that could not be run.
    """
    record = out / RECORD
    settings = {"threads": course.threads, "prompt": course.prompt, "new": course.new_tokens}
    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}
    try:
        for name in names:
            try:
                workers[name] = _worker(name, out / name, peers, course)
            except InputError as error:
                failed[name] = str(error)
        key = {**settings, "rows": sorted(workers)}
        known = read(record)
        rounds: list[dict[str, Turn]] = known["rounds"] if known.get("key") == key else []
        draw = random.Random(len(rounds))
        while len(rounds) < course.rounds:
            for name in draw.sample(list(workers), len(workers)):
                time.sleep(PAUSE)
                workers[name].turn()
            rounds.append({name: worker.turns[-1] for name, worker in workers.items()})
            write(record, {"key": key, "rounds": rounds})
    finally:
        for worker in workers.values():
            with contextlib.suppress(OSError):
                worker.stop()
    return failed


def _worker(name: str, directory: Path, peers: Path, course: Course) -> Worker:
    runtime = ROWS[name].runtime
    if runtime == "llama.cpp":
        return LlamaWorker(directory, course, peers)
    if runtime == "onnx":  # the same threads for every tool's
        directory = with_threads(directory, course.threads)
    return Worker(runtime, directory, course)


def spreads(record: Mapping[str, Any], name: str) -> dict[str, tuple[float, ...]]:
    """Of a row, ``prefill`` and ``decode``: tokens a second and, of the ratio, its quartiles.

    The ratio is to the baseline of its runtime; empty for a row that was not run.
    """
    rounds = record.get("rounds", [])
    if not rounds or name not in rounds[0]:
        return {}
    base = BASELINES[ROWS[name].runtime]
    amounts = {"prefill": record["key"]["prompt"], "decode": record["key"]["new"] - 1}
    found: dict[str, tuple[float, ...]] = {}
    for i, (what, tokens) in enumerate(amounts.items()):
        rate = statistics.median(tokens / turns[name][i] for turns in rounds)
        ratios = [turns[base][i] / turns[name][i] for turns in rounds if base in turns]
        known = len(ratios) > 1
        found[what] = (rate, *(statistics.quantiles(ratios, n=4) if known else ()))
    return found
