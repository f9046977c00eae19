"""Artifacts are loaded once, in a process each, and take turns with their compositions."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.bundles.adapters import FAMILIES
from benchmarks.bundles.exporting import FOLDED, way_of
from benchmarks.bundles.records import Parity, Way
from benchmarks.bundles.speed import Turn
from benchmarks.export.turns import PAUSE, Course, Process, cosine


class Runner(Process):
    """A process that holds an artifact.

    Attributes:
        loaded: Seconds it took.
        cold: The first turns of its compositions, in order.
        warm: All later turns.
    """

    def __init__(self, artifact: str, out: Path, course: Course, first: str) -> None:
        numbers = [str(n) for n in (course.threads, course.prompt, course.new_tokens)]
        arguments = [way_of(artifact), str(out / artifact), first, *numbers]
        super().__init__("benchmarks.bundles.speed", arguments, out / artifact, course.threads)
        self.loaded, _ = self.answer()
        self.cold: dict[str, Turn] = {}
        self.warm: list[Turn] = []

    def turn(self, name: str) -> None:
        """Let it have a turn of a composition."""
        turn = Turn(*self.ask(f"turn {name}"))
        if name in self.cold:
            self.warm.append(turn)
        else:
            self.cold[name] = turn

    def logits(self, name: str) -> np.ndarray:
        """After the prompt, float32 [vocab]."""
        return np.array(self.ask(f"logits {name}"), np.float32)

    def way(self, course: Course) -> Way:
        """What was measured."""
        memory = [turn.memory for turn in self.cold.values()]
        return Way(
            load=self.loaded,
            memory=memory[0],
            more=[after - before for before, after in pairwise(memory)],
            prefill=[course.prompt / turn.prefill for turn in self.warm],
            decode=[(course.new_tokens - 1) / turn.decode for turn in self.warm],
            cold=[turn.switch for turn in self.cold.values()][1:],
            warm=[turn.switch for turn in self.warm],
        )


def run(
    artifacts: Sequence[str], out: Path, compositions: Sequence[str], course: Course
) -> tuple[dict[str, Way], dict[str, Parity]]:
    """Load all artifacts; let each use every composition once, then the first two in turns.

    Args:
        artifacts: In ``exporting.ARTIFACTS``, as ``out / NAME``.
        out: The directory of the run.
        compositions: Those that are used; a folded artifact has the first alone.
        course: What is done in a turn, and how often.
    """
    draw = random.Random(0)
    runners: dict[str, Runner] = {}
    try:
        for name in artifacts:
            runners[name] = Runner(name, out, course, compositions[0])
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
        parity = {
            family: _parity(runners[f"{family}-methods"], runners[f"{family}-inputs"], compositions)
            for family in FAMILIES
        }
        return {name: runner.way(course) for name, runner in runners.items()}, parity
    finally:
        for runner in runners.values():
            runner.stop()


def _parity(methods: Runner, inputs: Runner, compositions: Sequence[str]) -> Parity:
    pairs = [(methods.logits(name), inputs.logits(name)) for name in compositions]
    return Parity(
        difference=max(float(np.abs(m - i).max() / np.abs(i).max()) for m, i in pairs),
        cosine=min(cosine(m, i) for m, i in pairs),
    )
