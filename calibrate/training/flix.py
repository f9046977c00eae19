"""FLix: one low-rank update per feature; the updates of the features that apply are added.

Source: "Multitask Multilingual Model Adaptation with Featurized Low-Rank Mixtures"
(arXiv 2402.17934). A data set has features (its task, its language, …) and its update is
ΔW = Σ Bᵢ·Aᵢ over them. A new set of trained features needs no further training.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from caliport.calibrate.low_rank import LowRankUpdate, linear_shapes, targeted
from caliport.calibrate.merges.exact import exact
from caliport.calibrate.training.attach import attached
from caliport.calibrate.training.batches import Encoded
from caliport.calibrate.training.loop import TrainRun, fit
from caliport.calibrate.training.lora import COMPONENTS
from caliport.core.errors import InputError
from caliport.core.untrusted import check_name


@dataclass(frozen=True)
class FeatureSettings:
    """Which features are trained, and how.

    Attributes:
        ranks: Rank of each feature to train.
        scale: Factor of B·A, a LoRA's α/r; inside B after training.
        dropout: Probability that a feature is off for an example in a step, drawn independently;
            at least one stays on. The paper's rate is not known to us: sweep it.
        target_modules: Last part of the names of the linear layers to adapt.
    """

    ranks: Mapping[str, int]
    scale: float = 2.0
    dropout: float = 0.1
    target_modules: tuple[str, ...] = COMPONENTS

    def __post_init__(self) -> None:
        """Check the names: each becomes a directory; ``InputError`` for one that cannot."""
        for name in self.ranks:
            check_name(name, "the feature")


@dataclass(frozen=True)
class FeatureSet:
    """A data set, or part of one, with the features that apply to it."""

    features: tuple[str, ...]
    examples: Sequence[Encoded]


def train_features(
    model: PreTrainedModel,
    sets: Sequence[FeatureSet],
    features: FeatureSettings,
    run: TrainRun,
    kept: Mapping[str, LowRankUpdate] | None = None,
) -> tuple[dict[str, LowRankUpdate], list[dict[str, float]]]:
    """Train the features of ``features.ranks`` together on a mixture of data sets.

    A batch mixes data sets. The cost of a step depends on the features active in it, not on how
    many others there are.

    Args:
        model: The base; frozen.
        sets: What to train on.
        features: Ranks, scale and dropout.
        run: Settings, title, checkpoint and micro-batch.
        kept: Features trained earlier. They are applied where a data set has them, but not
            changed, so that a feature can be added or replaced later.

    Returns:
        The trained features by name, and the loss curve.

    Raises:
        InputError: A feature that no data set has, a data set with a feature that is neither
            trained nor kept, or ``features.target_modules`` that name no linear layer of the base.
    """
    kept = kept or {}
    _check(sets, features.ranks, kept)
    torch.manual_seed(run.settings.seed)
    linear, named = linear_shapes(model), targeted(model, features.target_modules)
    shapes = {name: linear[name] for name in named}
    trained = _Features(features.ranks, shapes, features.scale)
    pooled = [example for one in sets for example in one.examples]
    labels = [one.features for one in sets for _ in one.examples]
    active = ActiveFeatures(labels, features.dropout, run.settings.seed)

    def terms(module: str) -> Iterator[tuple[Tensor | None, Tensor, Tensor]]:
        for name, rows in active.groups:
            if name in features.ranks:
                yield rows, *trained.pair(name, module)
            elif module in kept[name].a:
                update = kept[name]
                device = next(trained.parameters()).device
                yield rows, update.a[module].to(device), update.b[module].to(device)

    modules = sorted({*shapes, *(m for update in kept.values() for m in update.modules)})
    model.eval().requires_grad_(False)
    try:
        with attached(model, modules, terms):
            curve = fit(model, trained, pooled, run, active)
    finally:
        model.requires_grad_(True)
    return {name: trained.update(name) for name in features.ranks}, curve


def compose(features: Mapping[str, LowRankUpdate], names: Sequence[str]) -> LowRankUpdate:
    """ΔW = Σ Bᵢ·Aᵢ of the named features, of rank Σ rᵢ; any set, even one never trained together.

    Raises:
        InputError: A name that is not a feature, or no names.
    """
    for name in names:
        if name not in features:
            raise InputError(
                f"feature {name!r} was not trained; expected one of {', '.join(sorted(features))}"
            )
    return exact([features[name] for name in names], [1.0] * len(names))


class _Features(nn.Module):
    """A and B of every feature and module; A uniform as in PEFT, B zero."""

    def __init__(
        self, ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], scale: float
    ) -> None:
        super().__init__()
        self._scale = scale
        self._modules_of = tuple(shapes)
        self.a = nn.ParameterDict()
        self.b = nn.ParameterDict()
        for feature, rank in ranks.items():
            for module, (out, into) in shapes.items():
                key = self._key(feature, module)
                self.a[key] = nn.Parameter(torch.empty(rank, into))
                nn.init.kaiming_uniform_(self.a[key], a=math.sqrt(5))
                self.b[key] = nn.Parameter(torch.zeros(out, rank))

    def pair(self, feature: str, module: str) -> tuple[Tensor, Tensor]:
        key = self._key(feature, module)
        return self.a[key], self.b[key] * self._scale

    def update(self, feature: str) -> LowRankUpdate:
        with torch.no_grad():
            pairs = {module: self.pair(feature, module) for module in self._modules_of}
        return LowRankUpdate(
            {m: a.detach().cpu().clone() for m, (a, _) in pairs.items()},
            {m: b.detach().cpu().clone() for m, (_, b) in pairs.items()},
        )

    @staticmethod
    def _key(feature: str, module: str) -> str:
        return f"{feature} {module}".replace(".", "/")


class ActiveFeatures:
    """Which features are on in each row of the current batch.

    Seed, step and example decide it, so several processes, or a batch cut into micro-batches, drop
    the same features.
    """

    def __init__(self, labels: Sequence[tuple[str, ...]], dropout: float, seed: int) -> None:
        self._labels = labels
        self._dropout = dropout
        self._seed = seed
        self.groups: list[tuple[str, Tensor | None]] = []

    def __call__(self, indices: Sequence[int], step: int) -> None:
        """Draw the features of the next batch's rows: the ``on_batch`` of ``fit``."""
        rows: dict[str, list[int]] = {}
        for row, index in enumerate(indices):
            for feature in self._kept(index, step):
                rows.setdefault(feature, []).append(row)
        self.groups = [
            (feature, None if len(found) == len(indices) else torch.tensor(found))
            for feature, found in sorted(rows.items())
        ]

    def _kept(self, index: int, step: int) -> tuple[str, ...]:
        features = self._labels[index]
        draw = random.Random(f"{self._seed} {step} {index}")
        kept = tuple(feature for feature in features if draw.random() >= self._dropout)
        return kept or (draw.choice(features),)


def _check(
    sets: Sequence[FeatureSet], ranks: Mapping[str, int], kept: Mapping[str, LowRankUpdate]
) -> None:
    used = {feature for one in sets for feature in one.features}
    known = {*ranks, *kept}
    for one in sets:
        if not one.features:
            raise InputError("a data set of the mixture has no features; expected at least one")
    if not used <= known:
        missing = sorted(used - known)[0]
        raise InputError(
            f"feature {missing!r} has no rank; expected one of {', '.join(sorted(known))}"
        )
    if not set(ranks) <= used:
        raise InputError(
            f"feature {sorted(set(ranks) - used)[0]!r} is in no data set of the mixture; it would "
            "stay untrained"
        )
    both = sorted(set(ranks) & set(kept))
    if both:
        raise InputError(f"feature {both[0]!r} is both trained and kept; expected one of them")
