"""Train adapters: single-task LoRAs, joint experts, one LoRA on a mixture, and FLix features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.directories import read_manifest
from caliport.core.errors import InputError
from caliport.core.prompts import PROMPT
from caliport.stages.sources import Source
from caliport.stages.stage import stage
from caliport.stages.sweep import at_best_rate, divergence_noted, held_out, seconds_of

if TYPE_CHECKING:
    from caliport.calibrate.training.flix import FeatureSettings
    from caliport.calibrate.training.loop import TrainSettings
    from caliport.calibrate.training.lora import LoraSettings


@dataclass(frozen=True)
class Training:
    """How adapters are trained.

    Attributes:
        base: Directory or hub name of the base.
        settings: Steps, batch, schedule.
        rates: Learning rates to choose from by the loss on held-out examples; empty: that of
            ``settings``.
        micro_batch: Most examples in one forward pass.
    """

    base: str | Path
    settings: TrainSettings
    rates: tuple[float, ...] = ()
    micro_batch: int | None = None


@dataclass(frozen=True)
class _Stage:
    """What a training stage reads and what decides its result, apart from ``Training``.

    Attributes:
        name: For the manifest.
        sources: Examples.
        settings: Shape of what is trained.
        inputs: Further files and directories.
    """

    name: str
    sources: Sequence[Source]
    settings: Mapping[str, Any]
    inputs: Mapping[str, Path] = field(default_factory=dict)


Build = Callable[[Path, Training, dict[str, Any], Path, bool], None]
"""Trains into a directory, as ``Training`` says; adds manifest entries; may keep a checkpoint in
the file; if the last is true, also adds the held-out loss as ``tuning_loss``."""


def lora_to(
    out: Path, title: str, sources: Sequence[Source], lora: LoraSettings, training: Training
) -> None:
    """Train one LoRA on the examples of all sources into the PEFT directory ``out``."""

    def build(
        partial: Path, training: Training, extra: dict[str, Any], resume: Path, tune: bool
    ) -> None:
        from caliport.calibrate import write_peft
        from caliport.calibrate.training.attach import attached
        from caliport.calibrate.training.loop import TrainRun, evaluate
        from caliport.calibrate.training.lora import train_lora
        from caliport.core.checkpoints import load_base, load_tokenizer

        model = load_base(training.base)
        tokenizer = load_tokenizer(training.base, model)
        encoded = [e for source in sources for e in source.encoded(tokenizer, model)]
        run = TrainRun(training.settings, title, resume, training.micro_batch)
        update, extra["curve"] = train_lora(model, encoded, lora, run)
        extra["parameters"] = update.parameter_count
        if tune:
            kept = [e for s in sources for e in s.encoded(tokenizer, model, "tuning")]
            with attached(model, update.modules, lambda n: [(None, update.a[n], update.b[n])]):
                extra["tuning_loss"] = held_out(evaluate(model, kept))
        write_peft(update, partial, base=str(training.base))
        prompts = {source.prompt for source in sources}
        extra |= {PROMPT: prompts.pop()} if len(prompts) == 1 else {}

    _train(out, title, _Stage("lora", sources, {"lora": lora}), training, build)


def features_to(
    out: Path,
    title: str,
    sources: Sequence[Source],
    features: FeatureSettings,
    training: Training,
    kept: Path | None = None,
) -> None:
    """Train FLix features; ``out`` gets a PEFT directory for each.

    Args:
        out: The directory to create.
        title: What to tell the user.
        sources: Examples with their features.
        features: Ranks and dropout of the features to train.
        training: How to train them.
        kept: A directory of features trained earlier. Those not trained again are copied unchanged.
    """

    def build(
        partial: Path, training: Training, extra: dict[str, Any], resume: Path, tune: bool
    ) -> None:
        from caliport.calibrate import write_peft
        from caliport.calibrate.training.flix import train_features
        from caliport.calibrate.training.loop import TrainRun
        from caliport.core.checkpoints import load_base, load_tokenizer

        model = load_base(training.base)
        tokenizer = load_tokenizer(training.base, model)
        sets = [one for s in sources for one in s.feature_sets(tokenizer, model)]
        earlier = read_features(kept) if kept is not None else {}
        earlier = {name: u for name, u in earlier.items() if name not in features.ranks}
        run = TrainRun(training.settings, title, resume, training.micro_batch)
        trained, extra["curve"] = train_features(model, sets, features, run, earlier)
        for name, update in {**earlier, **trained}.items():
            write_peft(update, partial / name, base=str(training.base))
        extra["parameters"] = sum(update.parameter_count for update in trained.values())
        extra["features"] = sorted({**earlier, **trained})
        if tune:
            extra["tuning_loss"] = _loss_of_sets(model, tokenizer, sources, {**earlier, **trained})

    inputs = {} if kept is None else {"kept": kept}
    _train(out, title, _Stage("flix", sources, {"features": features}, inputs), training, build)


def read_features(directory: Path) -> dict[str, Any]:
    """The features in a directory, as ``LowRankUpdate`` by name.

    Raises:
        InputError: It is not a directory of features.
    """
    from caliport.calibrate import read_peft

    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; expected FLix features, one in each")
    found = sorted(p.parent for p in directory.glob("*/adapter_config.json"))
    if not found:
        raise InputError(f"{directory}: no features in it; expected a PEFT directory for each")
    return {path.name: read_peft(path, zero=True) for path in found}


def compose_features_to(
    out: Path, title: str, source: Path, names: Sequence[str], base: str, prompt: str
) -> None:
    """Write the sum of features as one PEFT directory, with the composition's prompt."""

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        from caliport.calibrate import write_peft
        from caliport.calibrate.training.flix import compose

        update = compose(read_features(source), names)
        extra["earlier_seconds"] = seconds_of(read_manifest(source))
        extra |= {"parameters": update.parameter_count, PROMPT: prompt}
        write_peft(update, partial, base=base)

    settings = {"names": list(names), PROMPT: prompt}
    stage(out, "compose", title, {"features": source}, settings, build)


def _loss_of_sets(
    model: Any, tokenizer: Any, sources: Sequence[Source], features: Mapping[str, Any]
) -> float:
    from caliport.calibrate.training.attach import attached
    from caliport.calibrate.training.flix import compose
    from caliport.calibrate.training.loop import evaluate

    losses = []
    for one in [x for s in sources for x in s.feature_sets(tokenizer, model, "tuning")]:
        update = compose(features, one.features)
        terms = {n: [(None, update.a[n], update.b[n])] for n in update.modules}
        with attached(model, update.modules, terms.__getitem__):
            found = evaluate(model, one.examples)
        losses.append(sum(found) / len(found))
    return held_out(losses)


def _train(out: Path, title: str, what: _Stage, training: Training, build: Build) -> None:
    """One stage; or one for each learning rate, and then the best of them."""
    inputs: dict[str, Path | str] = {"base": training.base, **what.inputs}
    inputs |= {f"examples {index}": source.path for index, source in enumerate(what.sources)}
    data = [source.settings for source in what.sources]

    def make(place: Path, shown: str, rate: float, tune: bool) -> None:
        chosen = replace(training, settings=replace(training.settings, learning_rate=rate))

        def noting(partial: Path, extra: dict[str, Any], resume: Path) -> None:
            with divergence_noted(extra, tune):
                build(partial, chosen, extra, resume, tune)

        stage(
            place,
            what.name,
            shown,
            inputs,
            {**what.settings, "train": chosen.settings, "data": data, "tune": tune},
            noting,
            together=True,
        )

    at_best_rate(out, title, training.rates or (training.settings.learning_rate,), make)
