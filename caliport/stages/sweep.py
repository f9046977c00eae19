"""Choose a learning rate: train at each, keep the one of lowest loss on held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shutil import copytree
from typing import Any

from caliport.core.directories import read_manifest
from caliport.core.prompts import PROMPT
from caliport.stages.stage import stage

Make = Callable[[Path, str, float, bool], None]
"""Trains into a directory, with a title, at a learning rate; if the last is true, also writes the
held-out loss into the manifest as ``tuning_loss``."""


def at_best_rate(out: Path, title: str, rates: Sequence[float], make: Make) -> None:
    """Make ``out`` at the one learning rate, or at the best of several.

    Each of several is a stage of its own; ``out`` is a copy of the one with the lowest held-out
    loss, and its manifest lists all that were tried, and what the one was made from.
    """
    if len(rates) == 1:
        make(out, title, rates[0], False)
        return
    tried = {rate: out.parent / f".{out.name}.rates" / f"{rate:g}" for rate in rates}
    for rate, place in tried.items():
        make(place, f"{title} at {rate:g}", rate, True)

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        found = {rate: read_manifest(place) for rate, place in tried.items()}
        losses = {rate: manifest["tuning_loss"] for rate, manifest in found.items()}
        rate = min(losses, key=lambda r: losses[r])
        copytree(tried[rate], partial, dirs_exist_ok=True)
        extra |= {k: found[rate][k] for k in ("parameters", "curve", PROMPT) if k in found[rate]}
        extra["chosen"] = {k: found[rate][k] for k in ("inputs", "settings") if k in found[rate]}
        extra["sweep"] = [{"learning_rate": r, "loss": loss} for r, loss in losses.items()]
        extra["learning_rate"] = rate
        extra["earlier_seconds"] = sum(map(seconds_of, found.values()))

    inputs = {f"{rate:g}": place for rate, place in tried.items()}
    stage(out, "compose", title, inputs, {}, build)


def seconds_of(manifest: Mapping[str, Any]) -> float:
    """Seconds to make a directory, including the trainings that it was chosen or copied from."""
    return float(manifest.get("seconds", 0) + manifest.get("earlier_seconds", 0))
