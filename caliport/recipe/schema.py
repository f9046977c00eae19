"""The fields of a recipe, the YAML file that configures a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from caliport.core.errors import InputError
from caliport.export.runtime import get
from caliport.recipe import bounds
from caliport.recipe.calibration import SEARCH, Calibration, Train
from caliport.recipe.fields import (
    Count,
    Layers,
    Limit,
    MethodName,
    Metric,
    Part,
    Place,
    Precision,
    PromptTemplate,
    Rank,
    Real,
    Tokens,
    Whole,
    Width,
    checked_name,
)
from caliport.recipe.methods import CORRECTED, Method, parse
from caliport.recipe.shipping import Export
from caliport.validation.baseline.regression import RegressionLimits


class TaskFiles(Part):
    """A task's examples, JSON Lines with ``input`` and ``output``, and its prompt template."""

    train: Place
    validation: Place
    prompt: PromptTemplate


class Paper(Part):
    """The paper's data sets and models: see ``caliport.data.paper`` and docs/paper_benchmark.md.

    Attributes:
        dialogsum, persona_chat, ted, sound_natural: The sets' folders in ``data.directory``.
        translation: A sequence-to-sequence model from English for each language.
        tone: A causal language model that changes the tone.
        cache: File of rewritten texts, shared by all runs.
        split: The split used as ``validation`` in the run; the paper scores on test.
        compositional: Maximum training examples of a composition, each rewritten by a model.
    """

    dialogsum: Place = Path("dialogsum")
    persona_chat: Place = Path("persona_chat")
    ted: Place = Path("ted")
    sound_natural: Place = Path("sound_natural")
    translation: dict[Annotated[str, Field(pattern="^(es|fr|de)$")], str] = Field(
        default_factory=dict
    )
    tone: str | None = None
    cache: Place = Path("runs/paper-rewritten.jsonl")
    split: Literal["validation", "test"] = "test"
    compositional: Count = 10_000


class Data(Part):
    """The source of the examples, and how many of each task are used."""

    source: Literal["pocket", "multi30k", "paper", "files"]
    directory: Place | None = None
    files: dict[str, TaskFiles] = Field(default_factory=dict)
    paper: Paper | None = None
    train: Count | None = None
    validation: Count | None = None
    too_long: Literal["refuse", "leave-out"] = "refuse"

    @model_validator(mode="after")
    def _source_has_its_fields(self) -> Data:
        if self.source == "multi30k" and self.directory is None:
            raise ValueError("source multi30k needs `directory`, the folder with task1/ and task2/")
        if self.source == "paper" and (self.directory is None or self.paper is None):
            raise ValueError("source paper needs `directory`, the sets' folder, and `paper`")
        if self.source == "files" and not self.files:
            raise ValueError("source files needs `files`, a mapping from task to its files")
        return self


class Shape(Part):
    """A base trained from scratch: see ``caliport.calibrate.training.small_base.BaseShape``."""

    vocab_size: Whole = Field(2048, ge=300, le=1_000_000)
    hidden_size: Width = 256
    intermediate_size: Width = 704
    layers: Layers = 4
    heads: Layers = 4
    key_value_heads: Layers = 2
    context: Tokens = 256


class Base(Part):
    """The base model: a checkpoint's ``path``, or ``train`` and ``shape`` to train one."""

    path: str | None = None
    shape: Shape = Shape()
    train: Train | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Base:
        if (self.path is None) == (self.train is None):
            raise ValueError("needs either `path` (a checkpoint) or `train`, and not both")
        if self.train is not None and len(self.train.rates) > 1:
            raise ValueError("train.learning_rate: expected one; a base is trained once")
        return self


class Lora(Part):
    """Shape and training of the single-task adapters that the recipe trains."""

    rank: Rank = 8
    alpha: Real = Field(16, gt=0, le=1e6)
    dropout: Real = Field(0.05, ge=0, lt=1)
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


class Flix(Part):
    """FLix, and one LoRA on the same mixture with the rank of the active features.

    Attributes:
        ranks: Rank of each feature.
        features: Features of each task and composition.
        train_on: The tasks and compositions to train on.
        dropout: Probability that a feature is off for one example in one step.
        prompt: One prompt for all data sets, with ``{input}``, so that only the features determine
            the task; None for each task's prompt. The mixture's LoRA always uses each task's
            prompt.
    """

    ranks: dict[str, Rank]
    features: dict[str, tuple[str, ...]]
    train_on: tuple[str, ...]
    dropout: Real = Field(0.1, ge=0, lt=1)
    prompt: PromptTemplate | None = None
    train: Train
    mixture: Train | None = None

    @model_validator(mode="after")
    def _names_fit(self) -> Flix:
        for feature in self.ranks:
            checked_name(feature, "the feature")
        for task, features in self.features.items():
            for feature in features:
                if feature not in self.ranks:
                    known = ", ".join(self.ranks)
                    raise ValueError(
                        f"features.{task} names {feature!r}, which has no rank; expected one of: "
                        f"{known}"
                    )
        for task in self.train_on:
            if task not in self.features:
                raise ValueError(f"train_on names {task!r}, which has no entry in features")
        return self

    @property
    def active_rank(self) -> int:
        """The highest total rank of active features in a task of ``train_on``."""
        return max(sum(self.ranks[f] for f in self.features[t]) for t in self.train_on)


class Judge(Part):
    """The model that judges answers: ``endpoint`` (OpenAI-compatible) and ``model``, or ``path``.

    ``key_variable`` is the environment variable with the endpoint's key; see
    ``caliport.validation.evaluation.judge`` for the other fields.
    """

    endpoint: str | None = None
    model: str | None = None
    key_variable: str | None = None
    timeout: Real = Field(60, gt=0, le=bounds.SECONDS)
    tries: Whole = Field(5, gt=0, le=100)
    path: str | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Judge:
        if (self.endpoint is None) == (self.path is None):
            raise ValueError("needs either `endpoint` and `model`, or `path`, and not both")
        if (self.endpoint is None) != (self.model is None):
            raise ValueError("needs `endpoint` and `model` together")
        return self


class Evaluation(Part):
    """How methods are scored on the validation split.

    ``quantized`` lists methods that are also scored with quantized weights, folded (``int4``) or
    with the update beside a quantized base (``int4-bundle``). ``judge`` decides for every fp32
    answer whether it is correct.
    """

    quantized: dict[
        Literal["int8", "int4", "int8-bundle", "int4-bundle"], tuple[MethodName, ...]
    ] = Field(default_factory=dict)
    judge: Judge | None = None
    examples: Count | None = None
    max_new_tokens: Tokens = 48
    batch_size: Count = 64
    metric: Metric = "rougeL"


class Validation(Part):
    """How artifacts are checked: see ``caliport.validation.gates.limits`` for the limits.

    ``runner`` runs the ONNX artifacts: ONNX Runtime itself (``plain``), or onnxruntime-genai.
    ``baseline`` is a stored baseline (a file, or a directory with one per machine) that artifacts
    are also compared with, within the limits of ``regression``. ``by_layer`` adds the residual
    streams to the error budget.
    """

    examples: Count = 32
    threads: Whole | None = Field(None, gt=0, le=bounds.THREADS)
    repetitions: Whole = Field(6, gt=0, le=bounds.ROUNDS)
    by_layer: bool = False
    runner: Literal["plain", "genai"] = "plain"
    limits: dict[Precision, dict[Limit, Annotated[Real, Field(ge=0, le=1e6)]]] = Field(
        default_factory=dict
    )
    baseline: Place | None = None
    regression: RegressionLimits = RegressionLimits()

    @model_validator(mode="after")
    def _levels_fit(self) -> Validation:
        for precision, limits in self.limits.items():
            if not 0 < limits.get("confidence", 0.5) < 1:
                raise ValueError(
                    f"limits.{precision}.confidence: expected more than 0, less than 1"
                )
        return self


class Recipe(Part):
    """The whole recipe. Paths are relative to the current directory."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    seed: Whole = Field(0, ge=-bounds.SEED, le=bounds.SEED)
    data: Data
    base: Base
    adapters: dict[str, Place | None]
    lora: Lora = Lora()
    compositions: dict[str, tuple[str, ...]] = Field(min_length=1)
    calibration: Calibration = Calibration()
    flix: Flix | None = None
    micro_batch: Count | None = None
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
            checked_name(name, "the task")
        untrained = [task for task, path in self.adapters.items() if path is None]
        if untrained and self.lora.train is None:
            raise ValueError(
                f"adapters.{untrained[0]} has no path and lora.train is missing; give one of them"
            )
        methods = {name: parse(name) for name in self.calibration.methods}
        self._weights_fit()
        self._export_fits(methods)
        self._training_fits(methods)
        if self.data.source == "files":
            for task in (*self.adapters, *self.compositions):
                if task not in self.data.files:
                    raise ValueError(f"data.files has no entry for {task}")
        return self

    def _weights_fit(self) -> None:
        weights = self.calibration.weights
        if weights == SEARCH and not self.calibration.tuning:
            raise ValueError(
                "calibration.weights is search, which needs calibration.tuning, the number of "
                "training examples held out to choose by"
            )
        if isinstance(weights, dict):
            known = [*dict.fromkeys(t for tasks in self.compositions.values() for t in tasks)]
            for task in (*weights, *known):
                if task not in known or task not in weights:
                    raise ValueError(
                        f"calibration.weights: found {', '.join(weights) or 'none'}, expected a "
                        f"weight for each of {', '.join(known)}"
                    )

    def _export_fits(self, methods: Mapping[str, Method]) -> None:
        wanted = self.export.method
        composed = [name for name, method in methods.items() if method.composed]
        if wanted != "best" and wanted not in composed:
            raise ValueError(
                f"export.method is {wanted}, expected best or one of calibration.methods that "
                f"give an adapter: {', '.join(composed) or 'none'}"
            )
        through = [name for name, method in methods.items() if method.precision == "int4"]
        if self.export.calibrates and through:
            raise ValueError(
                f"export.max_size, target_kl and tune_norms change what ships after {through[0]} "
                "was trained through int4; leave one out"
            )
        scored = {"int4", "int4-bundle"} & set(self.evaluation.quantized)
        if self.export.goal is not None and scored:
            raise ValueError(
                f"export.max_size and target_kl choose layers after methods were scored in "
                f"{min(scored)}; leave one out, or name export.int8_layers"
            )
        for runtime in self.export.runtimes if "bundle" in self.export.ship else ():
            for name in self.compositions:
                try:
                    get(runtime).check_name(name)
                except InputError as error:
                    raise ValueError(f"compositions.{name}: {error}") from None

    def _training_fits(self, methods: Mapping[str, Method]) -> None:
        calibration = self.calibration
        trained = {*CORRECTED, "joint"}
        plans: dict[str, Train | None] = {"adapters": self.lora.train}
        plans |= {n: calibration.training(m) for n, m in methods.items() if m.kind in trained}
        if self.flix is not None:
            plans |= {"flix": self.flix.train, "mixture": self.flix.mixture}
        sweeps = [name for name, train in plans.items() if train and len(train.rates) > 1]
        if sweeps and not calibration.tuning:
            raise ValueError(
                f"several learning rates for {sweeps[0]} need calibration.tuning, the number of "
                "training examples held out to choose by"
            )
        if {"flix", "mixture"} & {m.kind for m in methods.values()}:
            if self.flix is None:
                raise ValueError("calibration.methods has flix or mixture; expected a `flix` part")
            missing = [c for c in self.compositions if c not in self.flix.features]
            if missing:
                raise ValueError(f"flix.features has no entry for {missing[0]}")
        if self.flix is not None:
            for task in self.flix.features:
                if task not in (*self.adapters, *self.compositions):
                    raise ValueError(
                        f"flix.features names the task {task!r}, which is neither in adapters nor "
                        "in compositions"
                    )


def prompts_of(recipe: Recipe) -> Mapping[str, str]:
    """Prompt template of every task and composition in the recipe's data."""
    if recipe.data.source == "files":
        return {task: files.prompt for task, files in recipe.data.files.items()}
    if recipe.data.source == "multi30k":
        from caliport.data import multi30k

        return multi30k.PROMPTS
    if recipe.data.source == "paper":
        from caliport.data import paper

        return paper.PROMPTS
    from caliport.data import pocket

    return pocket.PROMPTS


def prompt_of(recipe: Recipe, composition: str, method: str) -> str:
    """The prompt that a method's adapter for a composition was trained with."""
    if method == "flix" and recipe.flix is not None and recipe.flix.prompt is not None:
        return recipe.flix.prompt
    return prompts_of(recipe)[composition]
