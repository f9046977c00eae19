"""What a recipe means for one run: examples, training settings, methods to score and export."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from caliport.core.errors import InputError
from caliport.data.examples import Example, read_jsonl
from caliport.export.quantization.choices import Quantization
from caliport.recipe.calibration import SEARCH, Train
from caliport.recipe.methods import CORRECTED, Method, parse
from caliport.recipe.schema import Recipe, prompts_of
from caliport.run.workspace import Workspace, need
from caliport.stages.compose import ComposeSettings
from caliport.stages.sources import Source

if TYPE_CHECKING:
    from caliport.calibrate.training.loop import TrainSettings


_MOST_CHOSEN_ON, _SHARE = 200, 5


def examples_of(space: Workspace, task: str, split: str, count: int | None = None) -> list[Example]:
    """The first ``count`` examples of a task (all of them when None)."""
    return read_jsonl(space.data / f"{task}.{split}.jsonl")[:count]


def reported(space: Workspace, task: str, count: int | None) -> list[Example]:
    """The first ``count`` validation examples that no choice is made on (all of them when None)."""
    return _validation(space, task)[0][:count]


def chosen_on(space: Workspace, composition: str) -> list[Example]:
    """The validation examples that ``best_method`` chooses on, which are never reported.

    They are the last fifth, at most 200; empty where there is nothing to choose.
    """
    return _validation(space, composition)[1]


def _validation(space: Workspace, task: str) -> tuple[list[Example], list[Example]]:
    """The validation examples to report, and those to choose on."""
    recipe, examples = space.recipe, examples_of(space, task, "validation")
    chooses = task in recipe.compositions and recipe.export.method == "best"
    back = min(_MOST_CHOSEN_ON, -(-len(examples) // _SHARE))
    if not chooses or len(_small(recipe)) < 2 or len(examples) < 2:
        back = 0
    cut = len(examples) - back
    return examples[:cut], examples[cut:]


def _small(recipe: Recipe) -> list[str]:
    return [name for name in recipe.calibration.methods if parse(name).small]


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


def compose_settings(space: Workspace, method: Method) -> ComposeSettings:
    """How a recipe's method composes."""
    recipe = space.recipe
    train = recipe.calibration.training(method) if method.kind in CORRECTED else None
    return ComposeSettings(
        space.base,
        method,
        train_settings(train, recipe.seed) if train else None,
        train.rates if train else (),
        recipe.calibration.merge,
        recipe.calibration.weights == SEARCH,
        recipe.calibration.target_modules,
        parameters={"density": recipe.calibration.density, "seed": recipe.seed},
        micro_batch=recipe.micro_batch,
        quantization=quantization_of(recipe, method.precision),
        any_base=recipe.calibration.any_base,
    )


def weights_of(space: Workspace, composition: str) -> tuple[float, ...] | None:
    """The recipe's weights of a composition's adapters; None: 1/N each, or those to be found."""
    weights = space.recipe.calibration.weights
    if weights is None or isinstance(weights, str):
        return None
    tasks = space.recipe.compositions[composition]
    return tuple(weights[task] if isinstance(weights, dict) else weights for task in tasks)


def quantization_of(recipe: Recipe, precision: str | None) -> Quantization | None:
    """How a recipe quantizes the weights of linear layers and embeddings in a precision."""
    if precision is None:
        return None
    if precision != "int4":
        return Quantization(precision)
    return Quantization(precision, recipe.export.int8_layers, recipe.export.embedding_bits)


def train_settings(train: Train, seed: int) -> TrainSettings:
    """A recipe's training as the library's settings, at the first learning rate."""
    from caliport.calibrate.training.loop import TrainSettings

    return TrainSettings(**{**train.model_dump(), "learning_rate": train.rates[0]}, seed=seed)


FP32 = "fp32"


def variants_of(space: Workspace, method: str) -> tuple[str, ...]:
    """The precisions that a method is scored in: fp32, and those of ``evaluation.quantized``."""
    quantized = space.recipe.evaluation.quantized
    return (FP32, *(variant for variant, methods in quantized.items() if method in methods))


def best_method(space: Workspace, composition: str) -> str:
    """The method to export: the recipe's, or the small method (``Method.small``) of lowest loss.

    The losses are of ``chosen_on``'s examples; with a single one in all, of that.

    Raises:
        InputError: Nothing has been scored yet, or the recipe has no small method.
    """
    if space.recipe.export.method != "best":
        return space.recipe.export.method
    small = _small(space.recipe)
    if not small:
        raise InputError(
            "export.method is best and calibration.methods has no merge and no correction"
        )
    scores = {name: read_score(space, composition, name) for name in small}
    return min(small, key=lambda name: scores[name].get("choice_loss", scores[name]["loss"]))


def expanded_methods(space: Workspace, tasks: tuple[str, ...]) -> list[str]:
    """The recipe's methods; ``lora`` becomes one per single adapter."""
    found: list[str] = []
    for method in space.recipe.calibration.methods:
        found += [f"lora-{task}" for task in tasks] if method == "lora" else [method]
    return found


def read_score(
    space: Workspace, composition: str, method: str, variant: str = FP32
) -> dict[str, Any]:
    """The result of ``score_method``: loss, metrics, outputs, and the values of each example."""
    path = space.kept("scores", composition, method, variant) / "score.json"
    need(path, f"score of {method}", "calibrate")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
