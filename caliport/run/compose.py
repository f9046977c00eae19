"""The first half of a run: examples, base, single-task adapters, compositions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from caliport.data.examples import Example, read_jsonl, write_jsonl
from caliport.recipe.calibration import SEARCH, Train
from caliport.recipe.methods import CORRECTED, MERGED, Method, parse
from caliport.recipe.schema import Recipe, prompt_of, prompts_of
from caliport.run.audit import audit_all
from caliport.run.integers import frozen_base
from caliport.run.resolve import (
    compose_settings,
    examples_of,
    source_of,
    train_settings,
    weights_of,
)
from caliport.run.workspace import Workspace
from caliport.stages.compose import (
    ComposeSettings,
    CompositionInputs,
    compose_shared,
    compose_to,
    pick,
)
from caliport.stages.sources import Source
from caliport.stages.stage import stage
from caliport.stages.train import Training, compose_features_to, features_to, lora_to

SPLITS = ("train", "validation")


def compose_all(space: Workspace) -> None:
    """Make everything that scoring and export need."""
    prepare_all(space)
    audit_all(space)
    for composition in space.recipe.compositions:
        for method in map(parse, space.recipe.calibration.methods):
            if method.composed:
                compose(space, composition, method)


def prepare_all(space: Workspace) -> None:
    """Make examples, base and single-task adapters: everything that composing needs."""
    make_data(space)
    if space.recipe.base.train is not None:
        train_base(space)
    for task, path in space.recipe.adapters.items():
        if path is None:
            train_adapter(space, task)
        elif space.is_approximated(task):
            how = ComposeSettings(space.base, parse("exact"), dora=space.recipe.calibration.dora)
            only = CompositionInputs({task: path}, names=(task,))
            compose_to(space.adapter(task), f"adapter {task} without DoRA", only, how)


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
    if data.source == "paper":
        from caliport.data import paper
        from caliport.data.rewriting import Rewriter

        assert data.directory is not None
        assert data.paper is not None
        folder = data.directory / getattr(data.paper, paper.set_of(task))
        part = split if split == "train" else data.paper.split
        if split == "train" and task in paper.COMPOSITIONS:
            count = min(count or data.paper.compositional, data.paper.compositional)
        rewrite = Rewriter(data.paper.translation, data.paper.tone, data.paper.cache)
        return paper.examples(folder, task, part, count, recipe.seed, rewrite)
    from caliport.data import pocket

    return pocket.examples(task, split, count or 10_000, recipe.seed)


def train_base(space: Workspace) -> None:
    """Train a small Llama and its tokenizer on the single tasks only, not on compositions."""
    recipe = space.recipe
    assert recipe.base.train is not None
    settings = train_settings(recipe.base.train, recipe.seed)

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        from caliport.calibrate.training.loop import TrainRun, fit
        from caliport.calibrate.training.small_base import BaseShape, build_model, build_tokenizer

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
            for example in source_of(space, task, False).encoded(tokenizer, model)
        ]
        run = TrainRun(settings, "base", resume, recipe.micro_batch)
        extra["curve"] = fit(model, model, encoded, run)
        extra["parameters"] = sum(p.numel() for p in model.parameters())
        model.eval().save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    whole = {"shape": recipe.base.shape, "train": settings, "tasks": list(recipe.adapters)}
    whole["prompts"] = {task: prompts_of(recipe)[task] for task in recipe.adapters}
    inputs = {task: space.data / f"{task}.train.jsonl" for task in recipe.adapters}
    stage(space.root / "base", "base", "base model", inputs, whole, build, together=True)


def train_adapter(space: Workspace, task: str) -> None:
    """Train one single-task LoRA."""
    train = space.recipe.lora.train
    assert train is not None
    source = source_of(space, task, tuned=len(train.rates) > 1)
    _lora(space, space.adapter(task), f"adapter {task}", [source], train)


def _lora(
    space: Workspace,
    out: Path,
    title: str,
    sources: Sequence[Source],
    train: Train,
    rank: int | None = None,
) -> None:
    from caliport.calibrate.training.lora import LoraSettings

    lora = space.recipe.lora
    shape = LoraSettings(
        rank or lora.rank,
        lora.alpha * (rank or lora.rank) / lora.rank,
        lora.dropout,
        lora.target_modules,
    )
    lora_to(out, title, sources, shape, _training(space, train))


def _training(space: Workspace, train: Train) -> Training:
    recipe = space.recipe
    return Training(space.base, train_settings(train, recipe.seed), train.rates, recipe.micro_batch)


def compose(space: Workspace, composition: str, method: Method) -> None:
    """Make one composed adapter by one method, after any training it shares with others."""
    out = space.composed(composition, method.name)
    title = f"{composition}: {method.name}"
    prompt = prompt_of(space.recipe, composition, method.name)
    if method.kind == "flix":
        assert space.recipe.flix is not None
        _train_flix(space)
        names = space.recipe.flix.features[composition]
        compose_features_to(out, title, space.shared("flix"), names, str(space.base), prompt)
    elif method.kind == "mixture":
        _train_mixture(space)
        pick(out, title, space.shared("mixture"), ".", prompt)
    elif method.shared:
        inputs = {name: inputs_of(space, name, method) for name in space.recipe.compositions}
        settings = _settings(space, method)
        compose_shared(space.shared(method.name), method.name, inputs, settings)
        pick(out, title, space.shared(method.name), composition, prompt)
    elif method.kind == "joint":
        calibration = space.recipe.calibration
        train = calibration.training(method)
        source = source_of(space, composition, len(train.rates) > 1, calibration.examples)
        _lora(space, out, title, [source], train)
    else:
        one = inputs_of(space, composition, method)
        compose_to(out, title, one, _settings(space, method))


def _settings(space: Workspace, method: Method) -> ComposeSettings:
    form = f"{method.precision}-bundle" if method.bundle else ""
    return replace(compose_settings(space, method), integers=frozen_base(space, form))


def inputs_of(space: Workspace, composition: str, method: Method) -> CompositionInputs:
    """Adapters and examples of a composition."""
    recipe = space.recipe
    swept = method.kind in CORRECTED and len(recipe.calibration.training(method).rates) > 1
    merges = method.kind in (*MERGED, *CORRECTED)
    tuned = swept or (merges and recipe.calibration.weights == SEARCH)
    return CompositionInputs(
        {task: space.adapter(task) for task in recipe.compositions[composition]},
        source_of(space, composition, tuned, recipe.calibration.examples),
        weights=weights_of(space, composition) if merges else None,
    )


def _train_flix(space: Workspace) -> None:
    from caliport.calibrate.training.flix import FeatureSettings

    recipe = space.recipe
    flix = recipe.flix
    assert flix is not None
    scale = recipe.lora.alpha / recipe.lora.rank
    features = FeatureSettings(flix.ranks, scale, flix.dropout, recipe.lora.target_modules)
    sources = [source_of(space, t, len(flix.train.rates) > 1) for t in flix.train_on]
    if flix.prompt is not None:
        sources = [replace(source, prompt=flix.prompt) for source in sources]
    features_to(space.shared("flix"), "FLix", sources, features, _training(space, flix.train))


def _train_mixture(space: Workspace) -> None:
    """Train one LoRA on FLix's mixture, of the rank that is active at once in FLix."""
    flix = space.recipe.flix
    assert flix is not None
    train = flix.mixture or flix.train
    sources = [source_of(space, t, len(train.rates) > 1) for t in flix.train_on]
    out = space.shared("mixture")
    _lora(space, out, "one LoRA on the mixture", sources, train, flix.active_rank)
