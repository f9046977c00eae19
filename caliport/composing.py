"""The first half of a run: examples, base, single-task adapters, compositions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.data.examples import Example, read_jsonl, write_jsonl
from caliport.recipe import COMPOSED, Recipe, Train, prompts_of
from caliport.workspace import Workspace, stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from calibrate.batches import Encoded
    from calibrate.train import TrainSettings

SPLITS = ("train", "validation")


def compose_all(space: Workspace) -> None:
    """Make all that a run has to have before anything is scored or exported."""
    make_data(space)
    if space.recipe.base.train is not None:
        train_base(space)
    for task, path in space.recipe.adapters.items():
        if path is None:
            train_adapter(space, task)
    for composition in space.recipe.compositions:
        for method in space.recipe.calibration.methods:
            if method in COMPOSED:
                compose(space, composition, method)


def make_data(space: Workspace) -> None:
    """Write the examples of every task and composition as JSON Lines."""
    recipe = space.recipe

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        for task in (*recipe.adapters, *recipe.compositions):
            for split in SPLITS:
                examples = _draw(recipe, task, split)
                write_jsonl(partial / f"{task}.{split}.jsonl", examples)
                extra.setdefault("examples", {})[f"{task}.{split}"] = len(examples)

    inputs = {}
    if recipe.data.directory is not None:
        inputs["directory"] = recipe.data.directory
    for task, files in recipe.data.files.items():
        inputs |= {f"{task}.train": files.train, f"{task}.validation": files.validation}
    tasks = [*recipe.adapters, *recipe.compositions]
    settings = {"data": recipe.data, "tasks": tasks, "seed": recipe.seed}
    stage(space.data, "data", "examples", inputs, settings, build)


def _draw(recipe: Recipe, task: str, split: str) -> list[Example]:
    data = recipe.data
    count = data.train if split == "train" else data.validation
    if data.source == "files":
        return read_jsonl(getattr(data.files[task], split))[:count]
    if data.source == "multi30k":
        from caliport.data import multi30k

        assert data.directory is not None
        return multi30k.examples(data.directory, task, split, count, recipe.seed)
    from caliport.data import pocket

    return pocket.examples(task, split, count or 10_000, recipe.seed)


def examples_of(space: Workspace, task: str, split: str, count: int | None = None) -> list[Example]:
    """The first ``count`` examples of a task (all of them when None)."""
    return read_jsonl(space.data / f"{task}.{split}.jsonl")[:count]


def encoded_of(
    space: Workspace,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    task: str,
    count: int | None = None,
) -> list[Encoded]:
    """A task's training examples as token ids."""
    from calibrate.batches import encode

    pairs = [(e.input, e.output) for e in examples_of(space, task, "train", count)]
    return encode(tokenizer, prompts_of(space.recipe)[task], pairs, context, task)


def train_base(space: Workspace) -> None:
    """Train a small Llama and its tokenizer on the single tasks, never on a composition."""
    recipe = space.recipe
    assert recipe.base.train is not None
    settings = train_settings(recipe.base.train, recipe.seed)

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        from calibrate.base import BaseShape, build_model, build_tokenizer
        from calibrate.train import fit

        shape = BaseShape(**recipe.base.shape.model_dump())
        texts = [prompts_of(recipe)[task] for task in recipe.adapters]
        for task in recipe.adapters:
            for example in examples_of(space, task, "train"):
                texts += [example.input, example.output]
        tokenizer = build_tokenizer(texts, shape.vocab_size)
        model = build_model(tokenizer, shape, recipe.seed).train()
        encoded = [
            example
            for task in recipe.adapters
            for example in encoded_of(space, tokenizer, shape.context, task)
        ]
        extra["curve"] = fit(model, model, encoded, settings, "base", resume)
        extra["parameters"] = sum(p.numel() for p in model.parameters())
        model.eval().save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    whole = {"shape": recipe.base.shape, "train": settings, "tasks": list(recipe.adapters)}
    whole["prompts"] = {task: prompts_of(recipe)[task] for task in recipe.adapters}
    inputs = {task: space.data / f"{task}.train.jsonl" for task in recipe.adapters}
    stage(space.root / "base", "base", "base model", inputs, whole, build)


def train_adapter(space: Workspace, task: str) -> None:
    """Train one single-task LoRA."""
    recipe = space.recipe
    assert recipe.lora.train is not None
    settings = train_settings(recipe.lora.train, recipe.seed)
    _train_lora(space, space.adapter(task), task, f"adapter {task}", settings, None)


def _train_lora(
    space: Workspace,
    out: Path,
    task: str,
    title: str,
    settings: TrainSettings,
    count: int | None,
) -> None:
    lora = space.recipe.lora

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        from calibrate.lora import LoraSettings, train_lora
        from caliport_core.checkpoints import load_base, load_tokenizer

        model = load_base(space.base)
        tokenizer = load_tokenizer(space.base, model)
        encoded = encoded_of(space, tokenizer, model.config.max_position_embeddings, task, count)
        shape = LoraSettings(lora.rank, lora.alpha, lora.dropout, lora.target_modules)
        update, extra["curve"] = train_lora(model, encoded, shape, settings, title, resume)
        extra["parameters"] = update.parameter_count
        update.to_peft(partial, base=str(space.base))

    inputs = {"base": space.base, "examples": space.data / f"{task}.train.jsonl"}
    whole = {
        "lora": lora.model_dump(mode="json", exclude={"train"}),
        "train": settings,
        "prompt": prompts_of(space.recipe)[task],
        "examples": count,
    }
    stage(out, "lora", title, inputs, whole, build)


def compose(space: Workspace, composition: str, method: str) -> None:
    """Make one composed adapter by one method."""
    recipe = space.recipe
    out = space.composed(composition, method)
    title = f"{composition}: {method}"
    if method == "joint":
        settings = train_settings(recipe.calibration.joint, recipe.seed)
        count = recipe.calibration.examples
        _train_lora(space, out, composition, title, settings, count)
        return
    adapters = {task: space.adapter(task) for task in recipe.compositions[composition]}
    train = {"lc": recipe.calibration.lc, "lc++": recipe.calibration.lcpp}.get(method)
    compose_to(
        out,
        title,
        space.base,
        adapters,
        method,
        train_settings(train, recipe.seed) if train else None,
        space.data / f"{composition}.train.jsonl",
        prompts_of(recipe)[composition],
        recipe.calibration.examples,
    )


def compose_to(
    out: Path,
    title: str,
    base: str | Path,
    adapters: Mapping[str, Path],
    method: str,
    train: TrainSettings | None,
    examples: Path | None,
    prompt: str,
    count: int | None,
) -> None:
    """Merge adapters and, for ``lc`` and ``lc++``, train the correction; write a PEFT directory.

    Args:
        out: The directory to appear.
        title: What to tell the user.
        base: The base model.
        adapters: Adapter directories by a name for each.
        method: ``linear``, ``exact``, ``lc`` or ``lc++``.
        train: How to train the correction; None for a plain merge.
        examples: JSON Lines of compositional examples; None for a plain merge.
        prompt: The composition's prompt with ``{input}``.
        count: Most examples used.
    """

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        from calibrate import LowRankUpdate
        from calibrate.batches import encode
        from calibrate.calibration import calibrate
        from calibrate.merge import MERGES
        from caliport_core.checkpoints import load_base, load_tokenizer

        updates = {name: LowRankUpdate.from_peft(path) for name, path in adapters.items()}
        model = load_base(base)
        for name, update in updates.items():
            update.check_fits(model, adapters[name])
        merged = MERGES["linear" if train else method](list(updates.values()))
        extra["parameters"] = 0
        if train is not None:
            assert examples is not None
            tokenizer = load_tokenizer(base, model)
            pairs = [(e.input, e.output) for e in read_jsonl(examples)[:count]]
            context = model.config.max_position_embeddings
            encoded = encode(tokenizer, prompt, pairs, context, str(examples))
            merged, extra["parameters"], extra["curve"] = calibrate(
                model, merged, method, encoded, train, title, resume
            )
        merged.to_peft(partial, base=str(base))

    inputs: dict[str, Path | str] = {"base": base}
    inputs |= {f"adapter {name}": path for name, path in adapters.items()}
    settings: dict[str, Any] = {"method": method}
    if train is not None:
        assert examples is not None
        inputs["examples"] = examples
        settings |= {"train": train, "prompt": prompt, "examples": count}
    stage(out, "compose", title, inputs, settings, build)


def train_settings(train: Train, seed: int) -> TrainSettings:
    """The recipe's fields as the library's plain settings."""
    from calibrate.train import TrainSettings

    return TrainSettings(**train.model_dump(), seed=seed)
