"""Make composed adapters: every method, for one composition or one correction for several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copytree
from typing import TYPE_CHECKING, Any, Literal

from caliport.core.directories import read_manifest
from caliport.recipe.methods import CORRECTED, MERGED, WEIGHTED, Method
from caliport.stages.sources import Source
from caliport.stages.stage import stage
from caliport.stages.sweep import at_best_rate, seconds_of

if TYPE_CHECKING:
    from caliport.calibrate import LowRankUpdate
    from caliport.calibrate.training.attach import Rounding
    from caliport.calibrate.training.batches import Encoded
    from caliport.calibrate.training.loop import TrainSettings

FEW = 64
"""Examples that LoraHub and LM-Cocktail weigh adapters by (few-shot, as in their papers)."""
_ONE = "one"


@dataclass(frozen=True)
class Job:
    """One composition to make: adapter directories by task, and examples if a method needs any."""

    adapters: Mapping[str, Path]
    source: Source | None = None


@dataclass(frozen=True)
class How:
    """How to make it.

    Attributes:
        base: Directory or hub name of the base.
        method: What to do.
        train: How to train a correction; None for methods that train nothing.
        rates: Learning rates to choose from by the loss on the held-out examples; empty: that of
            ``train``.
        merge: The merge underneath a correction, see ``caliport.calibrate.merges.registry.MERGES``.
        weights: Weights of a merge's adapters; None: equal.
        density: Share of values that TIES and DARE keep.
        seed: Of DARE and LoraHub.
        micro_batch: Most examples in one forward pass; decides memory, not the result.
    """

    base: str | Path
    method: Method
    train: TrainSettings | None = None
    rates: tuple[float, ...] = ()
    merge: str = "linear"
    weights: tuple[float, ...] | None = None
    density: float = 0.5
    seed: int = 0
    micro_batch: int | None = None


def compose_to(out: Path, title: str, job: Job, how: How) -> None:
    """Compose one adapter into the PEFT directory ``out``, choosing the learning rate if asked."""
    _tuned(out, title, {_ONE: job}, how)


def compose_shared(out: Path, title: str, jobs: Mapping[str, Job], how: How) -> None:
    """Train one correction for several compositions; ``out`` gets a PEFT directory for each."""
    _tuned(out, title, jobs, how)


def pick(out: Path, title: str, source: Path, below: str) -> None:
    """Make the PEFT directory ``out`` from one of those that a shared training gave."""

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        copytree(source / below, partial, dirs_exist_ok=True)
        kept = read_manifest(source)
        extra |= {k: kept[k] for k in ("parameters", "curve", "sweep") if k in kept}
        extra["earlier_seconds"] = seconds_of(kept)

    stage(out, "compose", title, {"source": source}, {"below": below}, build)


def _tuned(out: Path, title: str, jobs: Mapping[str, Job], how: How) -> None:
    train = how.train
    if train is None:
        _compose(out, title, jobs, how)
        return

    def make(place: Path, shown: str, rate: float, tune: bool) -> None:
        at_rate = replace(how, train=replace(train, learning_rate=rate))
        _compose(place, shown, jobs, at_rate, tune)

    at_best_rate(out, title, how.rates or (train.learning_rate,), make)


def _compose(out: Path, title: str, jobs: Mapping[str, Job], how: How, tune: bool = False) -> None:
    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        from caliport.calibrate import write_peft

        bench = _Bench(jobs, how, title)
        updates = bench.updates(extra, resume)
        if tune:
            extra["tuning_loss"] = bench.tuning_loss(updates)
        for name, update in updates.items():
            write_peft(update, partial if name == _ONE else partial / name, base=str(how.base))

    method = how.method
    inputs: dict[str, Path | str] = {"base": how.base}
    settings: dict[str, Any] = {"method": method.name, "tune": tune}
    needs_data = method.kind not in MERGED
    for name, job in jobs.items():
        inputs |= {f"{name} adapter {task}": path for task, path in job.adapters.items()}
        if needs_data:
            assert job.source is not None
            inputs[f"{name} examples"] = job.source.path
            settings[f"{name} data"] = job.source.settings
    if how.train is not None:
        settings |= {"train": how.train, "merge": how.merge}
    if how.train is None or how.merge in ("ties", "dare"):
        settings |= {"weights": how.weights, "density": how.density, "seed": how.seed}
    stage(out, "compose", title, inputs, settings, build, together=how.train is not None)


def merged(kind: str, updates: Sequence[LowRankUpdate], how: How) -> LowRankUpdate:
    """Merge updates by ``kind``, a name in ``MERGES`` or ``none``, as ``how`` says."""
    from caliport.calibrate.merges.common import none
    from caliport.calibrate.merges.dare import dare
    from caliport.calibrate.merges.registry import MERGES
    from caliport.calibrate.merges.ties import ties

    if kind == "none":
        return none(updates)
    if kind == "ties":
        return ties(updates, how.weights, density=how.density)
    if kind == "dare":
        return dare(updates, how.weights, density=how.density, seed=how.seed)
    return MERGES[kind](updates, how.weights)


class _Bench:
    """What the methods work with: the base, its tokenizer, the adapters and the examples."""

    def __init__(self, jobs: Mapping[str, Job], how: How, title: str) -> None:
        from caliport.calibrate import read_peft
        from caliport.calibrate.peft_files import check_same_base
        from caliport.core.checkpoints import load_base

        self.jobs, self.how, self.title = jobs, how, title
        self.model = load_base(how.base)
        self.rounding: Rounding | None = None
        paths = {p for job in jobs.values() for p in job.adapters.values()}
        check_same_base(sorted(paths))
        read = {path: read_peft(path) for path in paths}
        for path, update in read.items():
            update.check_fits(self.model, path)
        self.adapters = {
            name: {task: read[path] for task, path in job.adapters.items()}
            for name, job in jobs.items()
        }

    def updates(self, extra: dict[str, Any], resume: Path) -> dict[str, LowRankUpdate]:
        """One update a job, by the method; adds what the manifest should say."""
        kind = self.how.method.kind
        if kind in CORRECTED:
            return self._corrected(extra, resume)
        if kind in WEIGHTED:
            return {name: self._weighted(name, extra) for name in self.jobs}
        extra["parameters"] = 0
        return {
            name: merged(kind, list(updates.values()), self.how)
            for name, updates in self.adapters.items()
        }

    def tuning_loss(self, updates: Mapping[str, LowRankUpdate]) -> float:
        """Mean loss on the held-out examples of every job."""
        losses = [self._loss(updates[name], self._encoded(name, "tuning")) for name in self.jobs]
        return sum(losses) / len(losses)

    def _weighted(self, name: str, extra: dict[str, Any]) -> LowRankUpdate:
        from caliport.calibrate.merges.by_loss import lm_cocktail, lorahub

        updates = list(self.adapters[name].values())
        few = self._encoded(name, "train")[:FEW]
        if self.how.method.kind == "lorahub":
            update, weights = lorahub(updates, lambda u: self._loss(u, few), seed=self.how.seed)
        else:
            update, weights = lm_cocktail(updates, [self._loss(u, few) for u in updates])
        extra |= {"parameters": len(weights), "weights": [float(w) for w in weights]}
        return update

    def _corrected(self, extra: dict[str, Any], resume: Path) -> dict[str, LowRankUpdate]:
        from caliport.calibrate.corrections.common import Composition
        from caliport.calibrate.corrections.train import calibrate
        from caliport.export.quantization.tensors import as_shipped, rounded

        method, how = self.how.method, self.how
        assert how.train is not None
        underneath = "none" if method.alone else how.merge
        compositions = {
            name: Composition(updates, merged(underneath, list(updates.values()), how))
            for name, updates in self.adapters.items()
        }
        precision = method.precision
        folded = precision is not None and not method.bundle
        if precision is not None:
            keep = {m for c in compositions.values() for m in c.merged.modules} if folded else ()
            self.model = as_shipped(self.model, precision, keep)
            self.rounding = (lambda _, weight: rounded(weight, precision)) if folded else None
        calibrated = calibrate(
            self.model,
            compositions,
            method.kind,
            {name: self._encoded(name, "train") for name in self.jobs},
            how.train,
            self.title,
            per_layer=method.per_layer,
            rounding=self.rounding,
            micro_batch=how.micro_batch,
            resume=resume,
        )
        extra |= {"parameters": calibrated.parameters, "curve": calibrated.curve}
        return calibrated.updates

    def _encoded(self, name: str, part: Literal["train", "tuning"]) -> list[Encoded]:
        from caliport.core.checkpoints import load_tokenizer

        source = self.jobs[name].source
        assert source is not None
        return source.encoded(load_tokenizer(self.how.base, self.model), self.model, part)

    def _loss(self, update: LowRankUpdate, examples: Sequence[Encoded]) -> float:
        """Mean loss of examples, in nats a token, with the update beside the base."""
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
