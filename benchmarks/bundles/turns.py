"""Measure artifacts in turns, each loaded once in its own process."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.bundles.exporting import FOLDED, RUNS, artifact_of
from benchmarks.bundles.records import Parity, Way
from benchmarks.bundles.speed import Turn
from benchmarks.export.turns import PAUSE, Course, Process, cosine


class Runner(Process):
    """A worker process with an artifact.

    Attributes:
        loaded: Seconds to load and to use the first composition.
        cold: The first turns of its compositions, in order.
        warm: All later turns.
    """

    def __init__(self, family: str, run: str, out: Path, course: Course, first: str) -> None:
        numbers = [str(n) for n in (course.threads, course.prompt, course.new_tokens)]
        directory = out / artifact_of(family, run)
        arguments = [run, str(directory), first, *numbers]
        super().__init__("benchmarks.bundles.speed", arguments, directory, course.threads)
        self.loaded, _ = self.answer()
        self.cold: dict[str, Turn] = {}
        self.warm: list[Turn] = []

    def turn(self, name: str) -> None:
        """Run one turn of a composition."""
        turn = Turn(*self.ask(f"turn {name}"))
        if name in self.cold:
            self.warm.append(turn)
        else:
            self.cold[name] = turn

    def logits(self, name: str) -> np.ndarray:
        """Logits after the prompt, float32 [vocab]."""
        return np.array(self.ask(f"logits {name}"), np.float32)

    def way(self, course: Course) -> Way:
        """The measurements."""
        memory = [turn.memory for turn in self.cold.values()]
        return Way(
            load=[self.loaded],
            memory=memory[0],
            more=[after - before for before, after in pairwise(memory)],
            prefill=[course.prompt / turn.prefill for turn in self.warm],
            decode=[(course.new_tokens - 1) / turn.decode for turn in self.warm],
            cold=[turn.switch for turn in self.cold.values()][1:],
            warm=[turn.switch for turn in self.warm],
        )


def run(
    family: str, out: Path, compositions: Sequence[str], course: Course
) -> tuple[dict[str, Way], Parity]:
    """Load the artifacts of a family, use every composition once, then the first two in turns.

    Args:
        family: One of ``adapters.FAMILIES``.
        out: The directory of the run.
        compositions: The compositions to use; a folded artifact only has the first.
        course: The work of a turn, and the number of turns.

    Returns:
        Measurements by ``exporting.RUNS``, and the parity of methods and inputs.
    """
    draw = random.Random(0)
    runners: dict[str, Runner] = {}
    try:
        for name in RUNS:
            runners[name] = Runner(family, name, out, course, compositions[0])
        for composition in compositions:
            for name, runner in runners.items():
                if composition == compositions[0] or name != FOLDED:
                    time.sleep(PAUSE)
                    runner.turn(composition)
        for _ in range(course.rounds):
            for name in draw.sample(list(runners), len(runners)):
                time.sleep(PAUSE)
                for composition in compositions[: 1 if name == FOLDED else 2]:
                    runners[name].turn(composition)
        parity = _parity(runners["methods"], runners["inputs"], compositions)
        ways = {name: runner.way(course) for name, runner in runners.items()}
    finally:
        for runner in runners.values():
            runner.stop()
    load = loads(family, out, compositions[0], course)
    return {name: way.model_copy(update={"load": load[name]}) for name, way in ways.items()}, parity


def loads(family: str, out: Path, first: str, course: Course) -> dict[str, list[float]]:
    """Seconds to load, three times by ``exporting.RUNS``, with nothing else loaded."""
    found: dict[str, list[float]] = {name: [] for name in RUNS}
    for _ in range(3):
        for name, seconds in found.items():
            runner = Runner(family, name, out, course, first)
            seconds.append(runner.loaded)
            runner.stop()
    return found


def _parity(methods: Runner, inputs: Runner, compositions: Sequence[str]) -> Parity:
    pairs = [(methods.logits(name), inputs.logits(name)) for name in compositions]
    return Parity(
        difference=max(float(np.abs(m - i).max() / np.abs(i).max()) for m, i in pairs),
        cosine=min(cosine(m, i) for m, i in pairs),
    )
