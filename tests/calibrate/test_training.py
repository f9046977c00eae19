"""The training loop: its loss, exact resume, several processes, and losses that are not finite."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ENVIRONMENT
from torch import nn

from calibrate.attach import attached
from calibrate.batches import Encoded, Order, collate, encode
from calibrate.lora import LoraSettings, train_lora
from calibrate.train import TrainSettings, evaluate, fit, loss_of
from caliport_core.checkpoints import load_base, load_tokenizer
from caliport_core.errors import InputError


@pytest.fixture
def examples() -> list[Encoded]:
    draw = random.Random(1)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(5, 300) for _ in range(draw.randrange(low, high)))

    return [Encoded(tokens(3, 20), tokens(1, 9)) for _ in range(64)]


def test_lora_learns_and_leaves_the_base(base_dir: Path, examples: list[Encoded]) -> None:
    model = load_base(base_dir)
    names = [n for n, _ in model.named_modules()]
    before = {n: p.clone() for n, p in model.named_parameters()}
    settings = TrainSettings(steps=30, batch_size=16, learning_rate=1e-2)
    lora = LoraSettings(rank=4, alpha=8, dropout=0.0)
    update, curve = train_lora(model, examples, lora, settings, "lora")
    assert [n for n, _ in model.named_modules()] == names
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.2
    batch = collate(examples, pad=0)
    with torch.no_grad():
        plain = loss_of(model, batch)
        with attached(model, update.modules, lambda n: [(None, update.a[n], update.b[n])]):
            assert loss_of(model, batch) < plain - 0.2


@pytest.mark.parametrize("prompt_loss", [False, True])
def test_loss_is_the_unpadded_loss(
    prompt_loss: bool, base_dir: Path, examples: list[Encoded]
) -> None:
    """A padded batch gives the token-weighted mean of the examples' own losses."""
    model = load_base(base_dir)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for example in examples[:7]:
            ids = torch.tensor([example.prompt + example.target])
            logits = model(ids).logits[0, :-1]
            start = 0 if prompt_loss else len(example.prompt) - 1
            losses = nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")[start:]
            total, tokens = total + losses.sum().item(), tokens + len(losses)
        found = loss_of(model, collate(examples[:7], pad=0, prompt_loss=prompt_loss)).item()
    assert found == pytest.approx(total / tokens, rel=1e-4)


def test_order_covers_an_epoch_once() -> None:
    order = Order(list(range(40)), batch_size=8, seed=3)
    epoch = [i for step in range(5) for i in order[step]]
    assert sorted(epoch) == list(range(40))
    assert epoch != [i for step in range(5, 10) for i in order[step]]
    assert order[2] == Order(list(range(40)), 8, 3)[2], "a step alone decides its batch"


RESUMED = """
    import sys, torch
    from pathlib import Path
    from calibrate.attach import attached
from calibrate.batches import Encoded
    from calibrate.lora import LoraSettings, train_lora
    from calibrate.train import TrainSettings
    import calibrate.train
    from caliport_core.checkpoints import load_base
    base, out, resume = sys.argv[1:]
    calibrate.train._CHECKPOINT_SECONDS = 0.0
    torch.set_num_threads(1)
    examples = [Encoded((5 + i, 6 + i), (7 + i, 2)) for i in range(64)]
    settings = TrainSettings(steps=60, batch_size=8, learning_rate=1e-3)
    update, curve = train_lora(
        load_base(base), examples, LoraSettings(4, 8, 0.1), settings, "x", Path(resume)
    )
    torch.save({"b": dict(update.b), "curve": curve}, out)
"""


def test_killed_training_resumes_exactly(base_dir: Path, tmp_path: Path) -> None:
    """Killed without warning and started again, it ends with the same bits, dropout and all."""

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "-c", textwrap.dedent(RESUMED)]
        paths = [str(base_dir), str(tmp_path / f"{name}.pt"), str(tmp_path / f"{name}.resume")]
        root = Path(__file__).parents[2]
        return subprocess.Popen([*command, *paths], cwd=root, stderr=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    killed = start("killed")
    while not (tmp_path / "killed.resume").exists():
        assert killed.poll() is None, "ended before its first checkpoint"
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed.pt").exists()
    assert torch.load(tmp_path / "killed.resume")["step"] < 60
    assert start("killed").wait() == 0
    whole, resumed = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "killed.pt")
    assert whole["curve"] == resumed["curve"]
    assert all(torch.equal(whole["b"][n], resumed["b"][n]) for n in whole["b"])


def test_loss_that_is_not_finite_stops(
    base_dir: Path, tmp_path: Path, examples: list[Encoded]
) -> None:
    """It names step and examples, and keeps the last good state in the model and in the file."""
    model = load_base(base_dir)
    settings = TrainSettings(steps=40, batch_size=4, learning_rate=1e18, warmup=0.5)
    with pytest.raises(
        InputError, match=r"loss is nan.* at step \d+ \(examples \d+.*learning rate"
    ):
        fit(model, model, examples, settings, "base", tmp_path / "base.resume")
    state = torch.load(tmp_path / "base.resume")
    assert state["step"] > 0
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all()
        assert torch.equal(parameter, state["parameters"][name])


def test_gradient_that_is_not_finite_stops(base_dir: Path, examples: list[Encoded]) -> None:
    """The loss may still be finite then; the step would poison every parameter."""
    model = load_base(base_dir)
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(InputError, match=r"loss is \d.*, gradient (nan|inf) at step 0"):
        fit(model, model, examples, TrainSettings(steps=2, batch_size=4), "base")
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_accumulated_gradients_give_the_same_training(
    base_dir: Path, examples: list[Encoded]
) -> None:
    """Ten examples at a time, or three, and with each part its own examples announced."""
    seen: dict[int | None, list[int]] = {}
    updates = {}
    for micro_batch in (None, 3):
        seen[micro_batch] = []
        model = load_base(base_dir)
        lora = LoraSettings(rank=4, alpha=8, dropout=0.0)
        settings = TrainSettings(steps=6, batch_size=10, learning_rate=1e-2)
        updates[micro_batch], _ = train_lora(
            model, examples, lora, settings, "lora", micro_batch=micro_batch
        )
        model = load_base(base_dir)
        fit(
            model,
            model,
            examples,
            TrainSettings(steps=1, batch_size=10),
            "x",
            on_batch=lambda rows, step, key=micro_batch: seen[key].extend(rows),
            micro_batch=micro_batch,
        )
    assert seen[None] == seen[3] == Order([len(e.prompt + e.target) for e in examples], 10, 0)[0]
    for name in updates[None].modules:
        whole, parts = updates[None].delta(name), updates[3].delta(name)
        assert (whole - parts).norm() < 1e-4 * whole.norm()


def test_evaluate_is_each_example_alone(base_dir: Path, examples: list[Encoded]) -> None:
    model = load_base(base_dir)
    with torch.no_grad():
        alone = [loss_of(model, collate([e], pad=0)).item() for e in examples]
    assert evaluate(model, examples, batch_size=7) == pytest.approx(alone, rel=1e-4)


PROCESSES = """
    import sys, torch
    from calibrate.attach import attached
from calibrate.batches import Encoded
    from calibrate.lora import LoraSettings, train_lora
    from calibrate.train import TrainSettings
    from caliport_core.checkpoints import load_base
    from caliport_core.processes import is_main
    base, out = sys.argv[1:]
    torch.set_num_threads(1)
    examples = [Encoded((5 + i, 6 + i), (7 + i, *range(8, 8 + i % 3), 2)) for i in range(64)]
    settings = TrainSettings(steps=10, batch_size=9, learning_rate=1e-2)
    update, curve = train_lora(load_base(base), examples, LoraSettings(4, 8, 0.0), settings, "x")
    if is_main():
        torch.save({"a": dict(update.a), "b": dict(update.b), "curve": curve}, out)
"""


def launched(count: int, precision: str, base: Path, out: Path) -> dict[str, Any]:
    """The result of a training on ``count`` CPU processes."""
    script = out.with_suffix(".py")
    script.write_text(textwrap.dedent(PROCESSES))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    launch += ["--num_processes", str(count), "--mixed_precision", precision]
    done = subprocess.run(
        [*launch, str(script), str(base), str(out)],
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = torch.load(out)
    return found


@pytest.mark.slow
def test_two_processes_give_what_one_gives(base_dir: Path, tmp_path: Path) -> None:
    """The same global batch of nine examples, on one process and cut into five and four."""
    one, two = (launched(n, "no", base_dir, tmp_path / f"{n}.pt") for n in (1, 2))
    assert [p["loss"] for p in one["curve"]] == pytest.approx(
        [p["loss"] for p in two["curve"]], rel=1e-5
    )
    for name, a in one["a"].items():
        single, double = one["b"][name] @ a, two["b"][name] @ two["a"][name]
        assert (single - double).norm() < 1e-4 * single.norm()


@pytest.mark.slow
def test_mixed_precision_is_the_launchers(base_dir: Path, tmp_path: Path) -> None:
    """With bf16 the losses are near those of fp32, and not the same."""
    full, mixed = (launched(1, p, base_dir, tmp_path / f"{p}.pt") for p in ("no", "bf16"))
    losses = [[p["loss"] for p in found["curve"]] for found in (full, mixed)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_encode_refuses(base_dir: Path) -> None:
    tokenizer = load_tokenizer(base_dir)
    good = [("Anna", "Tom")]
    encoded = encode(tokenizer, "Say: {input}", good, 128, "task")[0]
    assert encoded.target[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encoded.prompt) == "<|begin|><|user|>Say: Anna<|assistant|>"
    with pytest.raises(InputError, match="task: no examples"):
        encode(tokenizer, "{input}", [], 128, "task")
    with pytest.raises(InputError, match="task: prompt"):
        encode(tokenizer, "Say", good, 128, "task")
    with pytest.raises(InputError, match="1 of 2 examples are longer than the context of 20"):
        encode(tokenizer, "{input}", [*good, ("Anna " * 30, "")], 20, "task")
