"""Choose a learning rate: train at each, keep the one of lowest loss on held-out examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree
from typing import Any

from rich.text import Text

from caliport.core.directories import read_manifest
from caliport.core.errors import Diverged, InputError
from caliport.core.progress import console
from caliport.core.prompts import PROMPT
from caliport.stages.stage import stage

_LOSS, _DIVERGED = "tuning_loss", "diverged"
_KEPT = ("parameters", "curve", "composed_of", "merge", "weights", "searched", PROMPT)
Make = Callable[[Path, str, float, bool], None]
"""Trains into a directory, with a title, at a learning rate; if the last is true, also writes the
held-out loss into the manifest as ``tuning_loss``."""


def at_best_rate(out: Path, title: str, rates: Sequence[float], make: Make) -> None:
    """Make ``out`` at the one learning rate, or at the best of several.

    Each of several is a stage of its own; ``out`` is a copy of the one with the lowest held-out
    loss, and its manifest lists all that were tried, and what the one was made from. A rate at
    which the training diverges is left out.

    Raises:
        InputError: The training diverged at every rate.
    """
    if len(rates) == 1:
        make(out, title, rates[0], False)
        return
    tried = {rate: out.parent / f".{out.name}.rates" / f"{rate:g}" for rate in rates}
    for rate, place in tried.items():
        make(place, f"{title} at {rate:g}", rate, True)

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        found = {rate: read_manifest(place) for rate, place in tried.items()}
        losses = {rate: m[_LOSS] for rate, m in found.items() if _DIVERGED not in m}
        if not losses:
            raise InputError(f"{title}: diverged at every rate: {found[min(tried)][_DIVERGED]}")
        rate = min(losses, key=lambda r: losses[r])
        copytree(tried[rate], partial, dirs_exist_ok=True)
        extra |= {k: found[rate][k] for k in _KEPT if k in found[rate]}
        extra["chosen"] = {k: found[rate][k] for k in ("inputs", "settings") if k in found[rate]}
        extra["sweep"] = [{"learning_rate": r, "loss": loss} for r, loss in losses.items()]
        if lost := [r for r in found if r not in losses]:
            extra["diverged_rates"] = lost
        extra["learning_rate"] = rate
        extra["earlier_seconds"] = sum(map(seconds_of, found.values()))

    inputs = {f"{rate:g}": place for rate, place in tried.items()}
    stage(out, "compose", title, inputs, {}, build)


@contextmanager
def divergence_noted(extra: dict[str, Any], tune: bool) -> Iterator[None]:
    """In a sweep (``tune``), note in the manifest that a training diverged, and go on."""
    try:
        yield
    except Diverged as error:
        if not tune:
            raise
        extra[_DIVERGED] = str(error)
        console.print(Text(f"{error}; this rate is left out", "yellow"), soft_wrap=True)


def held_out(losses: Sequence[float]) -> float:
    """The mean of held-out losses.

    Raises:
        Diverged: It is not finite, for which a training's own losses can be too few to tell.
    """
    mean = sum(losses) / len(losses)
    if not math.isfinite(mean):
        raise Diverged(f"the held-out loss is {mean}")
    return mean


def seconds_of(manifest: Mapping[str, Any]) -> float:
    """Seconds to make a directory, including the trainings that it was chosen or copied from."""
    return float(manifest.get("seconds", 0) + manifest.get("earlier_seconds", 0))
