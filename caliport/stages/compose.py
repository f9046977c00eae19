"""Make composed adapters by any method, for one composition or for several that share one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from shutil import copytree
from typing import TYPE_CHECKING, Any, Literal

from rich.text import Text

from caliport.core.directories import read_manifest
from caliport.core.errors import printable
from caliport.core.progress import console
from caliport.core.prompts import PROMPT
from caliport.export.package.card import origin_of
from caliport.export.quantization.choices import Quantization
from caliport.recipe.methods import CORRECTED, MERGED, WEIGHTED, Method, dora_rank
from caliport.stages.sources import Source
from caliport.stages.stage import stage
from caliport.stages.sweep import at_best_rate, divergence_noted, held_out, seconds_of

if TYPE_CHECKING:
    from caliport.calibrate import LowRankUpdate
    from caliport.calibrate.training.attach import Rounding
    from caliport.calibrate.training.batches import Encoded
    from caliport.calibrate.training.loop import TrainSettings

FEW_SHOT = 64
"""Examples that weights are searched on (few-shot, as in the papers)."""
SEARCHED = "searched"
"""Entry of a manifest: by composition, the weights that were chosen and those that were tried."""
_ONE = "one"


@dataclass(frozen=True)
class CompositionInputs:
    """One composition's adapters, and its examples if the method needs any.

    Attributes:
        adapters: PEFT LoRA directories by task.
        examples: Examples with their prompt.
        prompt: The composition's prompt, for its manifest; default that of the examples.
        names: What its manifest and cards call the adapters; default the tasks.
        weights: One per adapter: of a merge, of the merge under a correction, or where a correction
            that scales the adapters begins; None: 1/N each.
    """

    adapters: Mapping[str, Path]
    examples: Source | None = None
    prompt: str | None = None
    names: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None

    @property
    def recorded(self) -> dict[str, str]:
        """What the manifest of the composed adapter says of the prompt."""
        prompt = self.examples.prompt if self.prompt is None and self.examples else self.prompt
        return {} if prompt is None else {PROMPT: prompt}


@dataclass(frozen=True)
class ComposeSettings:
    """How to compose.

    Attributes:
        base: Directory or hub name of the base.
        method: The method.
        train: How to train a correction; None for methods that train nothing.
        rates: Learning rates to choose from by the loss on held-out examples; empty: that of
            ``train``.
        merge: The merge under a correction, a name in
            ``caliport.calibrate.merges.registry.MERGES``; None: ``linear``, or ``exact`` for
            adapters of different ranks or modules.
        search: Choose the weights by the loss on held-out examples
            (``caliport.calibrate.merges.weights``).
        target_modules: Last names of layers that a correction reaches besides the adapters' own.
        parameters: Parameters of merges and weight searches by name; each takes those it has.
        micro_batch: Most examples in one forward pass; changes memory use, not the result.
        quantization: What a method that trains through quantized weights trains through; None for
            the defaults of its precision.
        integers: A directory of the frozen base's calibrated integers that it trains through; None
            to quantize without text.
        dora: ``svd`` or ``svd=RANK``: take the nearest low-rank update of adapters with DoRA.
        any_base: Compose adapters that name different bases too, if their shapes fit this one.
    """

    base: str | Path
    method: Method
    train: TrainSettings | None = None
    rates: tuple[float, ...] = ()
    merge: str | None = None
    search: bool = False
    target_modules: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"density": 0.5, "seed": 0})
    micro_batch: int | None = None
    quantization: Quantization | None = None
    integers: Path | None = None
    dora: str | None = None
    any_base: bool = False

    @property
    def searches(self) -> bool:
        """Whether weights are searched: those of a merge, also under a correction."""
        kind = self.method.kind
        return self.search and not self.method.alone and kind in (*MERGED, *CORRECTED)


def compose_to(out: Path, title: str, inputs: CompositionInputs, settings: ComposeSettings) -> None:
    """Compose one adapter into the PEFT directory ``out``.

    With several learning rates, each is tried and the best one kept.
    """
    _compose_at_best_rate(out, title, {_ONE: inputs}, settings)


def compose_shared(
    out: Path, title: str, inputs: Mapping[str, CompositionInputs], settings: ComposeSettings
) -> None:
    """Train one correction for several compositions; ``out`` gets a PEFT directory for each."""
    _compose_at_best_rate(out, title, inputs, settings)


def pick(out: Path, title: str, source: Path, below: str, prompt: str) -> None:
    """Make the PEFT directory ``out`` a copy of ``source / below``, from a shared training.

    ``prompt`` is recorded as the composition's.
    """

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        copytree(source / below, partial, dirs_exist_ok=True)
        kept = read_manifest(source)
        extra |= {k: kept[k] for k in ("parameters", "curve", "sweep") if k in kept}
        if below in kept.get(SEARCHED, {}):
            extra["weights"] = kept[SEARCHED][below]["weights"]
        extra |= origin_of(kept, None if below == "." else below)
        extra |= {"earlier_seconds": seconds_of(kept), PROMPT: prompt}

    stage(out, "compose", title, {"source": source}, {"below": below, PROMPT: prompt}, build)


def merged(
    name: str | None,
    updates: Sequence[LowRankUpdate],
    weights: Sequence[float] | None,
    settings: ComposeSettings,
) -> LowRankUpdate:
    """Merge updates by a merge of ``MERGES``, with its parameters from ``settings``.

    ``name`` None is the default under a correction (``merge_under``).
    """
    from caliport.calibrate.merges.registry import MERGES

    merge = MERGES[merge_under(name, updates)]
    return merge(updates, weights, **_known(merge.parameters, settings))


def merge_under(name: str | None, updates: Sequence[LowRankUpdate]) -> str:
    """The merge under a correction: the one named, else ``linear``, or ``exact`` where it fails."""
    shapes = [{module: update.rank(module) for module in update.modules} for update in updates]
    return name or ("linear" if all(one == shapes[0] for one in shapes) else "exact")


def _known(parameters: Mapping[str, Any], settings: ComposeSettings) -> dict[str, Any]:
    """Those of the settings' parameters that a merge or a weight search has."""
    return {name: value for name, value in settings.parameters.items() if name in parameters}


def _compose_at_best_rate(
    out: Path, title: str, inputs: Mapping[str, CompositionInputs], settings: ComposeSettings
) -> None:
    train = settings.train
    if train is None:
        _compose(out, title, inputs, settings)
        return

    def make(place: Path, shown: str, rate: float, tune: bool) -> None:
        at_rate = replace(settings, train=replace(train, learning_rate=rate))
        _compose(place, shown, inputs, at_rate, tune)

    at_best_rate(out, title, settings.rates or (train.learning_rate,), make)


def _compose(
    out: Path,
    title: str,
    inputs: Mapping[str, CompositionInputs],
    settings: ComposeSettings,
    tune: bool = False,
) -> None:
    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        from caliport.calibrate import write_peft

        if _ONE in inputs and inputs[_ONE].names:
            extra["composed_of"] = list(inputs[_ONE].names)
        composer = _Composer(inputs, settings, title)
        extra |= composer.nearness
        with divergence_noted(extra, tune):
            updates = composer.updates(extra, resume)
            if tune:
                extra["tuning_loss"] = composer.tuning_loss(updates)
            for name, update in updates.items():
                write_peft(update, partial if name == _ONE else partial / name, str(settings.base))
        extra |= inputs[_ONE].recorded if _ONE in inputs else {}

    files, key = _stage_key(inputs, settings)
    key["tune"] = tune
    # Losses are computed on the devices of all processes, which must all take part.
    losses = settings.train is not None or settings.searches or settings.method.kind in WEIGHTED
    stage(out, "compose", title, files, key, build, together=losses)


def _stage_key(
    inputs: Mapping[str, CompositionInputs], settings: ComposeSettings
) -> tuple[dict[str, Path | str], dict[str, Any]]:
    """The files that a composition reads, and the settings that decide its result."""
    from caliport.calibrate.merges.registry import MERGES
    from caliport.calibrate.merges.weights import GRID

    method = settings.method
    files: dict[str, Path | str] = {"base": settings.base}
    if settings.integers is not None:
        files["integers"] = settings.integers
    key: dict[str, Any] = {"method": method.name}
    for name, one in inputs.items():
        files |= {f"{name} adapter {task}": path for task, path in one.adapters.items()}
        if method.kind not in MERGED or settings.searches:
            assert one.examples is not None
            files[f"{name} examples"] = one.examples.path
            key[f"{name} data"] = one.examples.settings
        elif one.recorded:
            key[f"{name} prompt"] = one.recorded[PROMPT]
        if settings.train is not None and one.weights is not None:
            key[f"{name} weights"] = one.weights
    if settings.dora is not None:
        key["dora"] = settings.dora
    if settings.train is not None:
        key |= {"train": settings.train, "merge": settings.merge or "linear"}
        if settings.target_modules:
            key["target_modules"] = settings.target_modules
        if settings.quantization is not None:
            key["quantization"] = settings.quantization
    if settings.train is None or _known(MERGES[settings.merge or "linear"].parameters, settings):
        weights = inputs[_ONE].weights if _ONE in inputs else None
        key |= {"weights": weights, **settings.parameters}
    if settings.searches:
        key["search"] = GRID
    return files, key


class _Composer:
    """Makes compositions by one method from the base, the adapters and the examples."""

    def __init__(
        self, inputs: Mapping[str, CompositionInputs], settings: ComposeSettings, title: str
    ) -> None:
        from caliport.calibrate.bases import check_same_base, note_base
        from caliport.core.checkpoints import load_base

        self.inputs, self.settings, self.title = inputs, settings, title
        self.model = load_base(settings.base)
        self.rounding: Rounding | None = None
        paths = {path for one in inputs.values() for path in one.adapters.values()}
        if not settings.any_base:
            check_same_base(sorted(paths))
        for path in paths:
            note_base(path, settings.base)
        self.nearness: dict[str, Any] = {}
        read = {path: self._read(path) for path in sorted(paths)}
        self.adapters = {
            name: {task: read[path] for task, path in one.adapters.items()}
            for name, one in inputs.items()
        }

    def _read(self, path: Path) -> LowRankUpdate:
        from caliport.calibrate.dora import read_nearest
        from caliport.calibrate.peft_files import read_update

        if self.settings.dora is None:
            return read_update(path, self.model)
        update, near = read_nearest(path, self.model, dora_rank(self.settings.dora))
        if near is not None:
            shown = printable(path.resolve().name, 100)
            self.nearness.setdefault("dora", []).append({"adapter": shown, **asdict(near)})
            text = (
                f"{shown}: DoRA as a low-rank update of rank {near.rank}: relative error "
                f"{near.mean:.1%} on average, at most {near.worst:.1%} ({near.module})"
            )
            console.print(Text(text), soft_wrap=True)
        return update

    def updates(self, extra: dict[str, Any], resume: Path) -> dict[str, LowRankUpdate]:
        """One update per composition; adds what the manifest should say to ``extra``."""
        kind = self.settings.method.kind
        if kind in CORRECTED:
            return self._corrected(extra, resume)
        if kind in WEIGHTED:
            return {name: self._weighted(name, extra) for name in self.inputs}
        extra["parameters"] = 0
        return {
            name: merged(kind, parts, self._weights(name, kind, extra), self.settings)
            for name, parts in self._parts.items()
        }

    @property
    def _parts(self) -> dict[str, list[LowRankUpdate]]:
        return {name: list(updates.values()) for name, updates in self.adapters.items()}

    def _weights(
        self, name: str, merge: str | None, extra: dict[str, Any]
    ) -> tuple[float, ...] | None:
        """A composition's weights: those given, or those of lowest loss on held-out examples."""
        if not self.settings.searches:
            return self.inputs[name].weights
        from caliport.calibrate.merges.weights import search_weights

        parts, examples = self._parts[name], self._encoded(name, "tuning")[:FEW_SHOT]

        def loss(weights: tuple[float, ...]) -> float:
            return self._loss(merged(merge, parts, weights, self.settings), examples)

        weights, tried = search_weights(len(parts), loss)
        shown = ", ".join(f"{weight:g}" for weight in weights)
        console.print(Text(f"{self.title}: weights {shown} of {len(tried)} tried"))
        found = {"weights": weights, "tried": [asdict(one) for one in tried]}
        extra.setdefault(SEARCHED, {})[name] = found
        extra |= {"weights": weights} if name == _ONE else {}
        return weights

    def tuning_loss(self, updates: Mapping[str, LowRankUpdate]) -> float:
        """Mean loss on the held-out examples of every composition, in nats a token."""
        return held_out(
            [self._loss(updates[name], self._encoded(name, "tuning")) for name in self.inputs]
        )

    def _weighted(self, name: str, extra: dict[str, Any]) -> LowRankUpdate:
        from caliport.calibrate.merges.by_loss.registry import WEIGHT_SEARCHES

        search = WEIGHT_SEARCHES[self.settings.method.kind]
        examples = self._encoded(name, "train")[:FEW_SHOT]
        update, weights = search(
            list(self.adapters[name].values()),
            lambda u: self._loss(u, examples),
            **_known(search.parameters, self.settings),
        )
        extra |= {"parameters": len(weights), "weights": [float(w) for w in weights]}
        return update

    def _corrected(self, extra: dict[str, Any], resume: Path) -> dict[str, LowRankUpdate]:
        from caliport.calibrate.corrections.common import Composition, reaching
        from caliport.calibrate.corrections.registry import CORRECTIONS
        from caliport.calibrate.corrections.train import calibrate
        from caliport.calibrate.merges.common import rank_zero
        from caliport.calibrate.training.loop import TrainRun
        from caliport.export.calibrated.integers import Integers
        from caliport.export.quantization.tensors import as_shipped, plan_of, rounded

        method, settings = self.settings.method, self.settings
        assert settings.train is not None
        kind = CORRECTIONS[method.kind]
        compositions = {}
        for name, parts in self._parts.items():
            under = merge_under(settings.merge, parts) if kind.merges else "exact"
            weights = self._weights(name, under, extra)
            merge = rank_zero(parts) if method.alone else merged(under, parts, weights, settings)
            if kind.merges:
                merge = reaching(merge, self.model, settings.target_modules)
                if settings.merge is None and under != "linear" and not method.alone:
                    extra["merge"] = under
                    text = f"{self.title}: adapters of different ranks or modules: {under} merge"
                    console.print(Text(text))
            compositions[name] = Composition(self.adapters[name], merge, weights)
        precision = method.precision
        folded = precision is not None and not method.bundle
        if precision is not None:
            how = settings.quantization or Quantization(precision)
            keep = {m for c in compositions.values() for m in c.merged.modules} if folded else ()
            forms = plan_of(self.model, how)
            known = None if settings.integers is None else Integers(settings.integers)
            self.model = as_shipped(self.model, how, keep, known)
            self.rounding = (lambda name, weight: rounded(weight, forms[name])) if folded else None
        calibrated = calibrate(
            self.model,
            compositions,
            method.kind,
            {name: self._encoded(name, "train") for name in self.inputs},
            TrainRun(settings.train, self.title, resume, settings.micro_batch),
            method.per_layer,
            self.rounding,
        )
        extra |= {"parameters": calibrated.parameters, "curve": calibrated.curve}
        return calibrated.updates

    def _encoded(self, name: str, part: Literal["train", "tuning"]) -> list[Encoded]:
        from caliport.core.checkpoints import load_tokenizer

        examples = self.inputs[name].examples
        assert examples is not None
        tokenizer = load_tokenizer(self.settings.base, self.model)
        return examples.encoded(tokenizer, self.model, part)

    def _loss(self, update: LowRankUpdate, examples: Sequence[Encoded]) -> float:
        """Mean loss of examples in nats a token, with the update attached to the base."""
        from caliport.calibrate.training.attach import attached, attached_rounded
        from caliport.calibrate.training.loop import evaluate

        def terms(module: str) -> list[Any]:
            return [(None, update.a[module], update.b[module])]

        attach = (
            attached(self.model, update.modules, terms)
            if self.rounding is None
            else attached_rounded(self.model, update.modules, terms, self.rounding)
        )
        with attach:
            losses = evaluate(self.model, examples)
        return sum(losses) / len(losses)
