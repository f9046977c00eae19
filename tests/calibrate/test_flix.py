"""FLix: the sum over features, what trains, what stays, and sets never trained together."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from caliport.calibrate import LowRankUpdate
from caliport.calibrate.training.attach import attached
from caliport.calibrate.training.batches import Encoded
from caliport.calibrate.training.flix import (
    ActiveFeatures,
    FeatureSet,
    FeatureSettings,
    compose,
    train_features,
)
from caliport.calibrate.training.loop import TrainRun, TrainSettings, evaluate
from caliport.core.checkpoints import load_base
from caliport.core.errors import InputError

RANKS = {"copy": 2, "de": 3, "fr": 2}
SETTINGS = TrainSettings(steps=40, batch_size=16, learning_rate=1e-2)


def examples(seed: int, target: int) -> list[Encoded]:
    """Any prompt, always the same answer, so that a few steps learn it."""
    draw = random.Random(seed)
    return [
        Encoded(tuple(draw.randrange(5, 300) for _ in range(6)), (target, target, 2))
        for _ in range(32)
    ]


SETS = [
    FeatureSet(("copy", "de"), examples(1, 40)),
    FeatureSet(("copy", "fr"), examples(2, 90)),
    FeatureSet(("de",), examples(3, 40)),
]


@pytest.fixture(scope="module")
def trained(base_dir: Path) -> dict[str, LowRankUpdate]:
    settings = FeatureSettings(RANKS, dropout=0.1)
    updates, curve = train_features(load_base(base_dir), SETS, settings, TrainRun(SETTINGS, "flix"))
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.5
    return updates


def loss(base: Path, update: LowRankUpdate, one: FeatureSet) -> float:
    model = load_base(base)
    with attached(model, update.modules, lambda n: [(None, update.a[n], update.b[n])]):
        return sum(evaluate(model, one.examples)) / len(one.examples)


def test_a_composition_is_the_sum_of_its_features(trained: dict[str, LowRankUpdate]) -> None:
    for names in (("copy", "de"), ("copy", "fr"), ("de", "fr"), ("copy", "de", "fr")):
        update = compose(trained, names)
        for module in update.modules:
            wanted = sum(trained[n].b[module] @ trained[n].a[module] for n in names)
            torch.testing.assert_close(update.delta(module), wanted, rtol=1e-4, atol=1e-5)
            assert update.rank(module) == sum(RANKS[n] for n in names)


def test_each_set_learns_its_own_answer(trained: dict[str, LowRankUpdate], base_dir: Path) -> None:
    """The mixture of batches reached the right features: the other language's do not serve."""
    right = loss(base_dir, compose(trained, ("copy", "de")), SETS[0])
    wrong = loss(base_dir, compose(trained, ("copy", "fr")), SETS[0])
    assert right < wrong - 1


def test_a_feature_is_added_and_the_others_stay(
    trained: dict[str, LowRankUpdate], base_dir: Path
) -> None:
    model = load_base(base_dir)
    before = {n: p.clone() for n, p in model.named_parameters()}
    kept = {name: {n: b.clone() for n, b in u.b.items()} for name, u in trained.items()}
    new = FeatureSet(("copy", "es"), examples(4, 150))
    run = TrainRun(SETTINGS, "es")
    added, _ = train_features(model, [new], FeatureSettings({"es": 2}), run, trained)
    assert set(added) == {"es"}
    assert all(torch.equal(kept[f][n], b) for f, u in trained.items() for n, b in u.b.items())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    together = {**trained, **added}
    right = loss(base_dir, compose(together, ("copy", "es")), new)
    assert right < loss(base_dir, compose(together, ("copy", "de")), new) - 1


def test_dropout_is_decided_by_seed_step_and_example() -> None:
    labels = [("a", "b"), ("a",), ("a", "b", "c")] * 100
    whole, part = ActiveFeatures(labels, 0.3, 0), ActiveFeatures(labels, 0.3, 0)
    whole(range(300), 7)
    part(range(150, 300), 7)

    def rows(active: ActiveFeatures, feature: str, count: int) -> set[int]:
        found = dict(active.groups)[feature]
        return set(range(count)) if found is None else set(found.tolist())

    for feature in "abc":
        late = {r - 150 for r in rows(whole, feature, 300) if r >= 150}
        assert late == rows(part, feature, 150), "a batch cut in two drops the same features"
    assert rows(whole, "a", 300) >= set(range(1, 300, 3)), "an only feature stays on"
    share = len(rows(whole, "c", 300)) / 100
    assert 0.55 < share < 0.85
    whole(range(300), 8)
    assert rows(whole, "c", 300) != rows(part, "c", 150)
    never = ActiveFeatures(labels, 0.0, 0)
    never(range(300), 0)
    assert dict(never.groups)["a"] is None


@pytest.mark.parametrize(
    ("sets", "ranks", "message"),
    [
        ([FeatureSet(("copy", "it"), [])], {"copy": 2}, "feature 'it' has no rank"),
        ([FeatureSet(("copy",), [])], {"copy": 2, "de": 2}, "'de' is in no data set"),
        ([FeatureSet((), [])], {"copy": 2}, "has no features"),
    ],
)
def test_refuses(
    sets: list[FeatureSet], ranks: dict[str, int], message: str, base_dir: Path
) -> None:
    run = TrainRun(SETTINGS, "x")
    with pytest.raises(InputError, match=message):
        train_features(load_base(base_dir), sets, FeatureSettings(ranks), run)


def test_unknown_feature_is_refused(trained: dict[str, LowRankUpdate]) -> None:
    with pytest.raises(InputError, match="feature 'it' was not trained; expected one of copy"):
        compose(trained, ("copy", "it"))
    with pytest.raises(InputError):
        compose(trained, ())
