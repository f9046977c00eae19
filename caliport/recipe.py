"""The recipe: one YAML file that says everything a run needs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from caliport_core.errors import InputError

Runtime = Literal["executorch", "onnx"]
Precision = Literal["fp32", "int8", "int4"]
Method = Literal["zero-shot", "lora", "linear", "exact", "lc", "lc++", "joint", "multi-step"]
Metric = Literal["rougeL", "chrf"]
COMPOSED: tuple[Method, ...] = ("linear", "exact", "lc", "lc++", "joint")
"""Methods that give one adapter for the composition."""
MERGED: tuple[Method, ...] = ("linear", "exact", "lc", "lc++")
"""Those of them that add at most kilobytes to the single-task adapters; `best` is one of these."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class TaskFiles(_Part):
    """A task's own examples: JSON Lines with ``input`` and ``output``, and its prompt."""

    train: Path
    validation: Path
    prompt: str


class Data(_Part):
    """Where examples come from and how many of each task are used."""

    source: Literal["pocket", "multi30k", "files"]
    directory: Path | None = None
    files: dict[str, TaskFiles] = {}
    train: int | None = Field(None, gt=0)
    validation: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _source_has_its_fields(self) -> Data:
        if self.source == "multi30k" and self.directory is None:
            raise ValueError("source multi30k needs `directory`, the folder with task1/ and task2/")
        if self.source == "files" and not self.files:
            raise ValueError("source files needs `files`, a mapping from task to its files")
        return self


class Train(_Part):
    """One training: see ``calibrate.train.TrainSettings``."""

    steps: int = Field(gt=0)
    batch_size: int = Field(32, gt=0)
    learning_rate: float = Field(5e-4, gt=0)
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = "cosine"
    warmup: float = Field(0.05, ge=0, le=1)
    prompt_loss: bool = False


class Shape(_Part):
    """Shape of a base trained from scratch: see ``calibrate.base.BaseShape``."""

    vocab_size: int = Field(2048, ge=300)
    hidden_size: int = Field(256, gt=0)
    intermediate_size: int = Field(704, gt=0)
    layers: int = Field(4, gt=0)
    heads: int = Field(4, gt=0)
    key_value_heads: int = Field(2, gt=0)
    context: int = Field(256, gt=0)


class Base(_Part):
    """The base model: a checkpoint's ``path``, or ``train`` and ``shape`` for one of our own."""

    path: str | None = None
    shape: Shape = Shape()
    train: Train | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Base:
        if (self.path is None) == (self.train is None):
            raise ValueError("needs either `path` (a checkpoint) or `train`, and not both")
        return self


class Lora(_Part):
    """Shape and training of the single-task adapters that the recipe trains itself."""

    rank: int = Field(8, gt=0)
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    train: Train | None = None


class Calibration(_Part):
    """How the corrections and the joint expert are trained on compositional examples."""

    examples: int = Field(10_000, gt=0)
    methods: tuple[Method, ...] = (
        "zero-shot",
        "lora",
        "linear",
        "exact",
        "lc",
        "lc++",
        "joint",
        "multi-step",
    )
    lc: Train = Train(steps=300, learning_rate=5e-3)
    lcpp: Train = Field(Train(steps=300, learning_rate=5e-3), alias="lc++")
    joint: Train = Train(steps=300, learning_rate=1e-3)


class Evaluation(_Part):
    """How methods are scored on the validation split."""

    examples: int | None = Field(None, gt=0)
    max_new_tokens: int = Field(48, gt=0)
    batch_size: int = Field(64, gt=0)
    metric: Metric = "rougeL"


class Export(_Part):
    """What is exported: every runtime in every precision."""

    method: Literal["best", "linear", "exact", "lc", "lc++", "joint"] = "best"
    runtimes: tuple[Runtime, ...] = ("executorch", "onnx")
    precisions: tuple[Precision, ...] = ("fp32", "int8", "int4")
    context: int | None = Field(None, gt=0)


class Validation(_Part):
    """How artifacts are checked: see ``validation.gates`` for what the limits mean."""

    examples: int = Field(32, gt=0)
    threads: int | None = Field(None, gt=0)
    repetitions: int = Field(5, gt=0)
    limits: dict[Precision, dict[str, float]] = {}


class Recipe(_Part):
    """All of a run. Paths are relative to the directory the command is called from."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 0
    data: Data
    base: Base
    adapters: dict[str, Path | None]
    lora: Lora = Lora()
    compositions: dict[str, tuple[str, ...]]
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    export: Export = Export()
    validation: Validation = Validation()

    @model_validator(mode="after")
    def _names_fit(self) -> Recipe:
        for composition, tasks in self.compositions.items():
            if len(tasks) < 2:
                raise ValueError(f"compositions.{composition} needs at least two tasks")
            for task in tasks:
                if task not in self.adapters:
                    known = ", ".join(self.adapters) or "none"
                    raise ValueError(
                        f"compositions.{composition} names the task {task!r}, which has no "
                        f"adapter; expected one of: {known}"
                    )
        for name in (*self.adapters, *self.compositions):
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"{name!r}: expected letters, digits, - and _ in a task's name")
        untrained = [task for task, path in self.adapters.items() if path is None]
        if untrained and self.lora.train is None:
            raise ValueError(
                f"adapters.{untrained[0]} has no path and lora.train is missing; give one of them"
            )
        if self.export.method not in ("best", *self.calibration.methods):
            raise ValueError(
                f"export.method is {self.export.method}, which is not in calibration.methods"
            )
        if self.data.source == "files":
            for task in (*self.adapters, *self.compositions):
                if task not in self.data.files:
                    raise ValueError(f"data.files has no entry for {task}")
        return self


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: A YAML file.
        overrides: ``field.subfield=value`` with the value in YAML; each replaces a field.

    Raises:
        InputError: One line that names the field, what was found and what would be right.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe; `caliport init` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as UTF-8 text ({error})") from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: found {type(content).__name__}, expected fields and values")
    for override in overrides:
        _override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {_first(error)}") from None


def _override(content: dict[str, Any], override: str) -> None:
    field, equals, value = override.partition("=")
    if not equals or not field:
        raise InputError(f"--set {override}: expected FIELD=VALUE, such as lora.rank=16")
    *parents, last = field.split(".")
    place = content
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise InputError(f"--set {override}: {parent} has no fields of its own")
    try:
        place[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"--set {override}: {value!r} is not a YAML value") from None


def _first(error: ValidationError) -> str:
    """The first problem as one line: field, what was found, what would be right."""
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"]) or "recipe"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]), _fields(problem["loc"]), 1)
        hint = (
            f"did you mean {near[0]}?" if near else f"known: {', '.join(_fields(problem['loc']))}"
        )
        return f"{field}: unknown field; {hint}"
    if problem["type"] == "missing":
        return f"{field}: missing; expected a value"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return message if field == "recipe" else f"{field}: {message}"
    return f"{field}: found {problem['input']!r}, {message[0].lower()}{message[1:]}"


def _fields(location: tuple[int | str, ...]) -> list[str]:
    """The names that are right where the last part of ``location`` is wrong."""
    part: Any = Recipe
    for step in location[:-1]:
        if not (isinstance(part, type) and issubclass(part, BaseModel)):
            return []
        found = [f for n, f in part.model_fields.items() if step in (n, f.alias)]
        if not found:
            return []
        part = _model_in(found[0].annotation)
    if not (isinstance(part, type) and issubclass(part, BaseModel)):
        return []
    return [field.alias or name for name, field in part.model_fields.items()]


def _model_in(annotation: Any) -> Any:
    """The model inside ``X``, ``X | None`` or ``dict[str, X]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inside = [_model_in(argument) for argument in getattr(annotation, "__args__", ())]
    return next((model for model in inside if model is not None), None)


def prompts_of(recipe: Recipe) -> Mapping[str, str]:
    """Prompt template of every task and composition the recipe's data knows."""
    if recipe.data.source == "files":
        return {task: files.prompt for task, files in recipe.data.files.items()}
    if recipe.data.source == "multi30k":
        from caliport.data import multi30k

        return multi30k.PROMPTS
    from caliport.data import pocket

    return pocket.PROMPTS
