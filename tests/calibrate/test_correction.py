"""LC, LC++ and column scales, in all their variants, against the papers' equations and PEFT."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import random_adapter
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from caliport.calibrate import LowRankUpdate, read_peft, write_peft
from caliport.calibrate.corrections.common import Composition, component_of, corrected_update
from caliport.calibrate.corrections.registry import CORRECTIONS
from caliport.calibrate.corrections.train import calibrate
from caliport.calibrate.merges.common import rank_zero
from caliport.calibrate.merges.linear import linear
from caliport.calibrate.training.attach import Rows, attached, attached_rounded
from caliport.calibrate.training.batches import Encoded
from caliport.calibrate.training.loop import TrainRun, TrainSettings, evaluate
from caliport.core.checkpoints import load_base
from caliport.export.decoder.fold import fold
from caliport.export.quantization.choices import Quantization
from caliport.export.quantization.tensors import as_shipped, dequantize, plan, quantize, rounded

METHODS = tuple(CORRECTIONS)


@pytest.fixture(scope="module")
def updates(adapter_dirs: list[Path]) -> dict[str, LowRankUpdate]:
    return {f"task{i}": read_peft(d) for i, d in enumerate(adapter_dirs)}


@pytest.fixture(scope="module")
def composition(updates: dict[str, LowRankUpdate]) -> Composition:
    return Composition(updates, linear(list(updates.values())))


@pytest.fixture(scope="module")
def examples() -> list[Encoded]:
    draw = random.Random(1)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(5, 300) for _ in range(draw.randrange(low, high)))

    return [Encoded(tokens(3, 20), tokens(1, 9)) for _ in range(64)]


def make(method: str, compositions: Mapping[str, Composition], per_layer: bool) -> nn.Module:
    """A correction with values other than those it starts with."""
    correction = CORRECTIONS[method](compositions, per_layer)
    torch.manual_seed(5)
    for parameter in correction.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return correction


def equation(
    method: str, correction: nn.Module, composition: Composition, module: str, owner: str
) -> torch.Tensor:
    """ΔW as the papers write it, column by column."""
    if method in ("scales", "cat"):  # Σᵢ Bᵢ·Aᵢ·diag(mᵢ), and Σᵢ wᵢ·Bᵢ·Aᵢ
        terms = [
            (update.b[module] @ update.a[module]) * correction.m[f"{task} {owner}"]
            for task, update in composition.updates.items()
        ]
        return torch.stack(terms).sum(0)
    merged = composition.merged
    wanted = merged.b[module] @ merged.a[module]
    if method == "lc":  # Eq. 6
        columns = [wanted[:, j] + correction.p[owner] for j in range(wanted.shape[1])]
        return torch.stack(columns, dim=1)
    return wanted + correction.p2[owner] @ correction.p1[owner]  # Eq. 7


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_equation(
    method: str,
    per_layer: bool,
    alone: bool,
    composition: Composition,
    base_dir: Path,
    tmp_path: Path,
    prompts: list[list[int]],
) -> None:
    """ΔW is the equation written out, and PEFT's logits of the saved directory are ours."""
    if alone:
        composition = Composition(
            composition.updates, rank_zero(list(composition.updates.values()))
        )
    correction = make(method, {"c": composition}, per_layer)
    update = corrected_update(correction, "c", composition)
    for module in update.modules:
        own = per_layer or not CORRECTIONS[method].per_layer
        owner = module.replace(".", "/") if own else component_of(module, update.shape(module))
        wanted = equation(method, correction, composition, module, owner).detach()
        torch.testing.assert_close(update.delta(module), wanted, rtol=1e-4, atol=1e-5)
        ranks = {"lc": 1, "lc++": 4, "scales": 8, "cat": 8}
        below = composition.merged.rank(module) if CORRECTIONS[method].merges else 0
        assert update.rank(module) == below + ranks[method]
    write_peft(update, tmp_path, base=str(base_dir))
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = load_base(base_dir)
    tokens = torch.tensor([prompts[2]])
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, tmp_path).eval()(tokens).logits
        with attached(model, update.modules, lambda name: [(None, *correction.factors("c", name))]):
            ours = model(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_parameter_counts(composition: Composition) -> None:
    """One P a component, whatever the number of layers: Σ out, 4·Σ(in + out), and N·Σ in."""
    shapes = [composition.merged.shape(n) for n in composition.merged.modules if ".0." in n]
    wanted = {
        "lc": sum(out for out, _ in shapes),
        "lc++": 4 * sum(out + into for out, into in shapes),
        "scales": 2 * sum(into for _, into in shapes),
    }
    for method, count in wanted.items():
        for per_layer, times in ((False, 1), (True, 2)):  # the tiny base has two layers
            correction = CORRECTIONS[method]({"c": composition}, per_layer)
            found = sum(p.numel() for p in correction.parameters() if p.requires_grad)
            assert found == count * times, (method, per_layer)


@pytest.mark.parametrize("method", METHODS)
def test_starts_as_the_merge(method: str, composition: Composition) -> None:
    """LC and LC++ as the merge underneath; scales and CAT as the mean of the ΔWᵢ."""
    update = corrected_update(CORRECTIONS[method]({"c": composition}), "c", composition)
    for name in composition.merged.modules:
        wanted = composition.merged.delta(name)
        if not CORRECTIONS[method].merges:
            wanted = sum(u.delta(name) for u in composition.updates.values()) / 2
        torch.testing.assert_close(update.delta(name), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_correction_learns(
    method: str, composition: Composition, base_dir: Path, examples: list[Encoded]
) -> None:
    """Base and adapters are the same bits afterwards; nothing else ever had a gradient."""
    model = load_base(base_dir)
    before = {n: p.clone() for n, p in model.named_parameters()}
    adapters = {
        t: {**u.a, **{f"b {n}": b for n, b in u.b.items()}} for t, u in composition.updates.items()
    }
    kept = {t: {n: x.clone() for n, x in values.items()} for t, values in adapters.items()}
    settings = TrainSettings(steps=30, batch_size=16, learning_rate=1e-2)
    found = calibrate(
        model, {"c": composition}, method, {"c": examples}, TrainRun(settings, method)
    )
    least = 0.0 if method == "cat" else 0.1  # of 28 weights in all
    assert found.curve[-1]["loss"] < found.curve[0]["loss"] - least
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(kept[t][n], x) for t, v in adapters.items() for n, x in v.items())
    assert found.parameters < composition.merged.parameter_count


def test_three_tasks_and_different_ranks(
    base_dir: Path, tmp_path: Path, updates: dict[str, LowRankUpdate], examples: list[Encoded]
) -> None:
    """Column scales take any adapters, one of another rank and on fewer modules among them."""
    third = random_adapter(base_dir, tmp_path / "c", 9, rank=2, target_modules=["q_proj"])
    three = {**updates, "c": read_peft(third)}
    composition = Composition(three, rank_zero(list(three.values())))
    settings = TrainSettings(steps=5, batch_size=16, learning_rate=1e-2)
    found = calibrate(
        load_base(base_dir),
        {"x": composition},
        "scales",
        {"x": examples},
        TrainRun(settings, "scales"),
    )
    ranks = {found.updates["x"].rank(n) for n in found.updates["x"].modules}
    assert ranks == {8, 10}


def test_shared_by_compositions(
    updates: dict[str, LowRankUpdate], base_dir: Path, examples: list[Encoded]
) -> None:
    """One P on top of each composition's own merge; rows of a batch use their own."""
    first, second = updates.values()
    both = {
        "x": Composition(updates, linear([first, second])),
        "y": Composition(updates, linear([first, second], [0.9, 0.1])),
    }
    settings = TrainSettings(steps=4, batch_size=8, learning_rate=1e-2)
    halves = {"x": examples[:32], "y": examples[32:]}
    found = calibrate(load_base(base_dir), both, "lc++", halves, TrainRun(settings, "shared"))
    for name in first.modules:
        p = {k: u.delta(name) - both[k].merged.delta(name) for k, u in found.updates.items()}
        torch.testing.assert_close(p["x"], p["y"], rtol=1e-4, atol=1e-4)
    assert found.parameters == 4 * sum(sum(first.shape(n)) for n in first.modules if ".0." in n)


def test_rows_of_a_batch_use_their_own_terms(
    updates: dict[str, LowRankUpdate], base_dir: Path, prompts: list[list[int]]
) -> None:
    """A mixed batch gives each row the logits that it has alone."""
    model = load_base(base_dir)
    rows = Rows(["task1", "task0", "task1", "task0"])
    tokens = torch.tensor([prompts[0]] * 4)
    modules = updates["task0"].modules

    def terms(name: str) -> list[tuple]:
        return [(r, updates[kind].a[name], updates[kind].b[name]) for kind, r in rows.groups]

    with torch.no_grad():
        rows([0, 1, 2, 3], 0)
        with attached(model, modules, terms):
            mixed = model(tokens).logits
        rows([0, 2], 0)
        assert [group for _, group in rows.groups] == [None], "one kind needs no routing"
        for row, kind in enumerate(["task1", "task0", "task1", "task0"]):
            update = updates[kind]
            with attached(model, modules, lambda n, u=update: [(None, u.a[n], u.b[n])]):
                alone = model(tokens[:1]).logits
            torch.testing.assert_close(mixed[row], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "how",
    [
        Quantization("int8"),
        Quantization("int4"),
        Quantization("int4", ("model.layers.1.mlp.down_proj", "lm_head"), 8),
    ],
)
def test_quantization_aware_runs_what_ships(
    how: Quantization, composition: Composition, base_dir: Path, prompts: list[list[int]]
) -> None:
    """Training's forward has the weights of fold, then quantize; to the last bit but summation."""
    model = load_base(base_dir)
    forms = plan(model, how.precision, how.int8_layers, how.embedding_bits)
    correction = make("lc++", {"c": composition}, False)
    update = corrected_update(correction, "c", composition)
    shipped = dequantize(quantize(fold(load_base(base_dir), update, "x"), how.precision, forms))
    training = as_shipped(model, how, update.modules)
    tokens = torch.tensor([prompts[2]])
    with torch.no_grad():
        wanted = shipped(tokens).logits
        with attached_rounded(
            training,
            update.modules,
            lambda name: [(None, *correction.factors("c", name))],
            lambda name, weight: rounded(weight, forms[name]),
        ):
            found = training(tokens).logits
        plain = model(tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - plain).abs().max() > 0.1
    assert all("forward" not in m.__dict__ for m in training.modules()), "left as it was"


def test_straight_through_gradient(composition: Composition, base_dir: Path) -> None:
    """The gradient of P is that of a dense W + (Q(W) - W).detach(), written out."""
    torch.manual_seed(0)
    linear_layer = nn.Linear(64, 48, bias=True)
    x = torch.randn(5, 64, requires_grad=True)
    a, b = torch.randn(3, 64) / 8, torch.randn(48, 3) / 8
    goal = torch.randn(5, 48)
    grads = []
    for dense in (True, False):
        a_, b_, x_ = (t.detach().clone().requires_grad_() for t in (a, b, x))
        if dense:
            weight = linear_layer.weight.detach() + b_ @ a_
            weight = weight + (rounded(weight.detach(), "int4") - weight.detach())
            out = nn.functional.linear(x_, weight, linear_layer.bias)
        else:
            holder = nn.Sequential(linear_layer)
            with attached_rounded(
                holder, ["0"], lambda _, a=a_, b=b_: [(None, a, b)], lambda _, w: rounded(w, "int4")
            ):
                out = holder(x_)
        ((out - goal) ** 2).sum().backward()
        grads.append((out.detach(), a_.grad, b_.grad, x_.grad))
    for naive, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-4)


def test_weights_are_rounded_once_a_step() -> None:
    """As long as the update does not change; micro-batches of a step share the rounded weight."""
    layer = nn.Linear(64, 48, bias=False)
    a, b = torch.randn(3, 64), torch.randn(48, 3)
    seen: list[str] = []

    def counted(name: str, weight: torch.Tensor) -> torch.Tensor:
        seen.append(name)
        return rounded(weight, "int4")

    holder, x = nn.Sequential(layer), torch.randn(2, 64)
    with attached_rounded(holder, ["0"], lambda _: [(None, a, b)], counted, keep=True):
        first = holder(x)
        assert torch.equal(holder(x), first)
        assert len(seen) == 1
        a += 1
        assert not torch.equal(holder(x), first)
        assert len(seen) == 2


@pytest.mark.slow
def test_quantization_aware_repairs(
    composition: Composition, base_dir: Path, examples: list[Encoded]
) -> None:
    """Trained through int4 weights, the loss with int4 weights is lower than trained in float."""
    settings = TrainSettings(steps=150, batch_size=16, learning_rate=1e-2)
    losses = {}
    for name, through in (("float", False), ("int4", True)):
        model = load_base(base_dir)
        if through:
            model = as_shipped(model, "int4", composition.merged.modules)
        found = calibrate(
            model,
            {"c": composition},
            "lc++",
            {"c": examples},
            TrainRun(settings, name),
            rounding=(lambda _, w: rounded(w, "int4")) if through else None,
        )
        folded = fold(load_base(base_dir), found.updates["c"], "x")
        losses[name] = sum(evaluate(dequantize(quantize(folded, "int4")), examples))
    assert losses["int4"] < losses["float"]
