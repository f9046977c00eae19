"""XXX."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from caliport.core.errors import InputError
from caliport.data.examples import Example, read_jsonl
from caliport.recipe.methods import CORRECTED, Method, parse
from caliport.recipe.schema import Train, prompts_of
from caliport.run.workspace import Workspace, need
from caliport.stages.compose import How
from caliport.stages.sources import Source

if TYPE_CHECKING:
    from caliport.calibrate.training.loop import TrainSettings


def examples_of(space: Workspace, task: str, split: str, count: int | None = None) -> list[Example]:
    """The first ``count`` examples of a task (all of them when None)."""
    return read_jsonl(space.data / f"{task}.{split}.jsonl")[:count]


def source_of(space: Workspace, task: str, tuned: bool, count: int | None = None) -> Source:
    """The training examples of a task or composition; with ``tuned`` some are held out."""
    recipe = space.recipe
    features = recipe.flix.features.get(task, ()) if recipe.flix is not None else ()
    return Source(
        space.data / f"{task}.train.jsonl",
        prompts_of(recipe)[task],
        count,
        recipe.calibration.tuning if tuned else 0,
        features,
        recipe.data.too_long == "leave-out",
    )


def how_of(space: Workspace, method: Method) -> How:
    """How a recipe's method composes."""
    recipe = space.recipe
    train = recipe.calibration.training(method) if method.kind in CORRECTED else None
    return How(
        space.base,
        method,
        train_settings(train, recipe.seed) if train else None,
        train.rates if train else (),
        recipe.calibration.merge,
        None,
        recipe.calibration.density,
        recipe.seed,
        recipe.micro_batch,
    )


def train_settings(train: Train, seed: int) -> TrainSettings:
    """The recipe's fields as the library's plain settings, at the first learning rate."""
    from caliport.calibrate.training.loop import TrainSettings

    return TrainSettings(**{**train.model_dump(), "learning_rate": train.rates[0]}, seed=seed)


FP32 = "fp32"


def variants_of(space: Workspace, method: str) -> tuple[str, ...]:
    """The weights that a method is scored with: fp32, and those of ``evaluation.quantized``."""
    quantized = space.recipe.evaluation.quantized
    return (FP32, *(variant for variant, methods in quantized.items() if method in methods))


def best_method(space: Workspace, composition: str) -> str:
    """The method to export: the recipe's, or the one of lowest loss among those of kilobytes.

    Raises:
        InputError: Nothing was scored yet, or the recipe has no method that can be exported.
    """
    if space.recipe.export.method != "best":
        return space.recipe.export.method
    scores = {
        name: read_score(space, composition, name)["loss"]
        for name in space.recipe.calibration.methods
        if parse(name).small
    }
    if not scores:
        raise InputError(
            "export.method is best and calibration.methods has no merge and no correction"
        )
    return min(scores, key=lambda method: scores[method])


def _expanded(space: Workspace, tasks: tuple[str, ...]) -> list[str]:
    """The recipe's methods; ``lora`` becomes one for each single adapter."""
    found: list[str] = []
    for method in space.recipe.calibration.methods:
        found += [f"lora-{task}" for task in tasks] if method == "lora" else [method]
    return found


def read_score(
    space: Workspace, composition: str, method: str, variant: str = FP32
) -> dict[str, Any]:
    """What ``score_method`` found: loss, metrics, outputs, and each example's figures."""
    path = space.kept("scores", composition, method, variant) / "score.json"
    need(path, f"score of {method}", "calibrate")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
