"""The training loop: its loss, its batches, exact resume, and losses that are not finite."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import assert_same, losses
from torch import nn

from caliport.calibrate.training import loop
from caliport.calibrate.training.attach import attached
from caliport.calibrate.training.batches import Encoded, Order, collate, encode
from caliport.calibrate.training.loop import TrainRun, TrainSettings, evaluate, fit, loss_of
from caliport.calibrate.training.lora import LoraSettings, train_lora
from caliport.core.checkpoints import load_base, load_tokenizer
from caliport.core.errors import InputError

LORA = LoraSettings(rank=4, alpha=8, dropout=0.0)
DROPPING = LoraSettings(rank=4, alpha=8, dropout=0.1)


@pytest.fixture
def examples() -> list[Encoded]:
    draw = random.Random(1)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(5, 300) for _ in range(draw.randrange(low, high)))

    return [Encoded(tokens(3, 20), tokens(1, 9)) for _ in range(64)]


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell starts its background jobs deaf to SIGINT, and training leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def always_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_CHECKPOINT_SECONDS", -1.0)


def order_of(examples: Sequence[Encoded], batch_size: int, seed: int = 0) -> Order:
    return Order([len(e.prompt + e.target) for e in examples], batch_size, seed)


def test_lora_learns_and_leaves_the_base(base_dir: Path, examples: list[Encoded]) -> None:
    model = load_base(base_dir)
    names = [n for n, _ in model.named_modules()]
    before = {n: p.clone() for n, p in model.named_parameters()}
    settings = TrainSettings(steps=30, batch_size=16, learning_rate=1e-2)
    update, curve = train_lora(model, examples, LORA, TrainRun(settings, "lora"))
    assert [n for n, _ in model.named_modules()] == names
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.2
    batch = collate(examples, pad=0)
    with torch.no_grad():
        plain = loss_of(model, batch)
        with attached(model, update.modules, lambda n: [(None, update.a[n], update.b[n])]):
            assert loss_of(model, batch) < plain - 0.2


def test_only_what_is_trained_has_gradients_and_optimizer_state(
    base_dir: Path, tmp_path: Path, examples: list[Encoded], always_save: None
) -> None:
    model = load_base(base_dir).requires_grad_(False)
    head = model.lm_head.requires_grad_(True)
    touched = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _, name=name: touched.add(name))
    settings = TrainSettings(steps=2, batch_size=4)
    fit(model, head, examples, TrainRun(settings, "head", tmp_path / "resume"))
    state = torch.load(tmp_path / "resume", weights_only=True)
    assert touched == {n for n, p in model.named_parameters() if p is head.weight}
    assert list(state["parameters"]) == ["weight"]
    assert len(state["optimizer"]["state"]) == 1
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("prompt_loss", [False, True])
def test_loss_is_the_unpadded_loss(
    prompt_loss: bool, base_dir: Path, examples: list[Encoded]
) -> None:
    """A padded batch gives the token-weighted mean of the examples' own losses."""
    model = load_base(base_dir)
    some = [*examples[:7], Encoded((), examples[8].prompt)]  # nothing predicts a first token
    total, tokens = 0.0, 0
    with torch.no_grad():
        for example in some:
            ids = torch.tensor([example.prompt + example.target])
            logits = model(ids).logits[0, :-1]
            start = 0 if prompt_loss else max(0, len(example.prompt) - 1)
            losses = nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")[start:]
            total, tokens = total + losses.sum().item(), tokens + len(losses)
        found = loss_of(model, collate(some, pad=0, prompt_loss=prompt_loss)).item()
    assert found == pytest.approx(total / tokens, rel=1e-4)


def test_evaluate_is_each_example_alone(base_dir: Path, examples: list[Encoded]) -> None:
    """In the examples' order, without gradients, and the model is as it was."""
    model = load_base(base_dir).train()
    found = evaluate(model, examples, 7)
    assert model.training
    model.eval()
    with torch.no_grad():
        alone = [loss_of(model, collate([e], pad=0)).item() for e in examples]
    assert found == pytest.approx(alone, rel=1e-4)


def test_order_covers_an_epoch_once() -> None:
    order = Order(list(range(40)), batch_size=8, seed=3)
    epoch = [i for step in range(5) for i in order[step]]
    assert sorted(epoch) == list(range(40))
    assert epoch != [i for step in range(5, 10) for i in order[step]]
    assert order[2] == Order(list(range(40)), 8, 3)[2], "a step alone decides its batch"


def test_the_callback_gets_the_rows_of_each_forward(
    base_dir: Path, examples: list[Encoded]
) -> None:
    """Whole batches, or parts of at most three; the model sees just those rows, in that order."""
    model = load_base(base_dir)
    order = order_of(examples, 10)
    for micro_batch, sizes in ((None, [10]), (3, [3, 3, 3, 1])):
        called: list[tuple[list[int], int]] = []
        inputs: list[torch.Tensor] = []
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs, inputs=inputs: inputs.append(kwargs["input_ids"]),
            with_kwargs=True,
        )
        fit(
            model,
            model,
            examples,
            TrainRun(TrainSettings(steps=2, batch_size=10), "base", None, micro_batch),
            on_batch=lambda rows, step, called=called: called.append((list(rows), step)),
        )
        hook.remove()
        assert [(len(rows), step) for rows, step in called] == [
            (n, s) for s in (0, 1) for n in sizes
        ]
        for step in (0, 1):
            assert [i for rows, at in called if at == step for i in rows] == order[step]
        for (rows, _), ids in zip(called, inputs, strict=True):
            assert torch.equal(ids, collate([examples[i] for i in rows], pad=0).input_ids)


def test_accumulated_gradients_give_the_same_training(
    base_dir: Path, examples: list[Encoded]
) -> None:
    settings = TrainSettings(steps=6, batch_size=10, learning_rate=1e-2)
    whole, parts = (
        train_lora(load_base(base_dir), examples, LORA, TrainRun(settings, "lora", None, size))
        for size in (None, 3)
    )
    assert_same(whole[0].a, parts[0].a)
    assert_same(whole[0].b, parts[0].b)
    assert losses(whole[1]) == pytest.approx(losses(parts[1]), rel=1e-5)


@pytest.mark.parametrize("stop_at", [1, 11])
def test_interrupted_training_resumes_exactly(
    stop_at: int, base_dir: Path, tmp_path: Path, examples: list[Encoded], always_save: None
) -> None:
    """Broken off within an epoch of eight steps, it ends with the same bits, dropout and all."""
    settings = TrainSettings(steps=14, batch_size=8, learning_rate=1e-3)
    whole, curve = train_lora(load_base(base_dir), examples, DROPPING, TrainRun(settings, "x"))
    resume = tmp_path / "resume"

    def fail(*_: object, **__: object) -> None:
        if resume.exists() and torch.load(resume, weights_only=True)["step"] == stop_at:
            raise RuntimeError("stopped here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "collate", lambda *a: (fail(), collate(*a))[1])
        with pytest.raises(RuntimeError, match="stopped here"):
            train_lora(load_base(base_dir), examples, DROPPING, TrainRun(settings, "x", resume))
    resumed, again = train_lora(
        load_base(base_dir), examples, DROPPING, TrainRun(settings, "x", resume)
    )
    assert again == curve
    assert_same(whole.b, resumed.b, tolerance=0)


def test_checkpoint_of_one_process_from_before_there_could_be_several(
    base_dir: Path, tmp_path: Path, examples: list[Encoded], always_save: None
) -> None:
    settings = TrainSettings(steps=6, batch_size=8, learning_rate=1e-3)
    model, resume = load_base(base_dir), tmp_path / "resume"
    whole, _ = train_lora(model, examples, DROPPING, TrainRun(settings, "x"))
    with pytest.raises(KeyboardInterrupt):
        interrupted(base_dir, examples, settings, resume, signal.SIGINT)
    state = torch.load(resume, weights_only=True)
    torch.save({**state, "rng": state["rng"][0]["cpu"]}, resume)
    resumed, _ = train_lora(model, examples, DROPPING, TrainRun(settings, "x", resume))
    assert_same(whole.b, resumed.b, tolerance=0)


def test_checkpoint_of_other_processes_says_so(
    base_dir: Path,
    tmp_path: Path,
    examples: list[Encoded],
    always_save: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = TrainSettings(steps=6, batch_size=8, learning_rate=1e-3)
    resume = tmp_path / "resume"
    with pytest.raises(KeyboardInterrupt):
        interrupted(base_dir, examples, settings, resume, signal.SIGINT)
    state = torch.load(resume, weights_only=True)
    torch.save({**state, "rng": state["rng"] * 2}, resume)
    train_lora(load_base(base_dir), examples, DROPPING, TrainRun(settings, "x", resume))
    said = " ".join(capsys.readouterr().err.split())
    assert "x: going on with 1 processes from a checkpoint of 2" in said


def interrupted(
    base: Path, examples: list[Encoded], settings: TrainSettings, resume: Path, number: int
) -> None:
    """Start a training that gets a signal while it computes its third step."""
    calls = 0

    def at_third(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), number)
        return collate(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "collate", at_third)
        train_lora(load_base(base), examples, DROPPING, TrainRun(settings, "x", resume))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends(
    number: int, base_dir: Path, tmp_path: Path, examples: list[Encoded]
) -> None:
    """It leaves after the step that it is at and can be resumed exactly; handlers stay."""
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    settings = TrainSettings(steps=6, batch_size=8, learning_rate=1e-3)
    whole, _ = train_lora(load_base(base_dir), examples, DROPPING, TrainRun(settings, "x"))
    with pytest.raises(KeyboardInterrupt):
        interrupted(base_dir, examples, settings, tmp_path / "resume", number)
    assert torch.load(tmp_path / "resume", weights_only=True)["step"] == 3
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    resume = tmp_path / "resume"
    resumed, _ = train_lora(
        load_base(base_dir), examples, DROPPING, TrainRun(settings, "x", resume)
    )
    assert_same(whole.b, resumed.b, tolerance=0)


def test_loss_that_is_not_finite_stops(
    base_dir: Path, tmp_path: Path, examples: list[Encoded]
) -> None:
    """It names step and examples, and keeps the last good state in the model and in the file."""
    model, resume = load_base(base_dir), tmp_path / "base.resume"
    settings = TrainSettings(steps=40, batch_size=12, learning_rate=1e18, warmup=0.5)
    with pytest.raises(InputError, match=r"^base: loss is nan, .* at step \d+ ") as caught:
        fit(model, model, examples, TrainRun(settings, "base", resume))
    state = torch.load(resume, weights_only=True)
    step = state["step"]
    shown = ", ".join(map(str, order_of(examples, 12)[step][:8]))
    assert f"at step {step} (examples {shown}, …; 12 in all" in str(caught.value)
    assert str(resume) in str(caught.value)
    assert "lower the learning rate" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert step > 0
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all()
        assert torch.equal(parameter, state["parameters"][name])
    again = load_base(base_dir)
    with pytest.raises(InputError, match=f"at step {step} "):  # it goes on from there and fails so
        fit(again, again, examples, TrainRun(settings, "base", resume))


def test_gradient_that_is_not_finite_stops(base_dir: Path, examples: list[Encoded]) -> None:
    """The loss may still be finite then; the step would poison every parameter."""
    model = load_base(base_dir)
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(InputError, match=r"loss is \d.*, gradient norm (nan|inf) at step 0"):
        fit(model, model, examples, TrainRun(TrainSettings(steps=2, batch_size=4), "base"))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_precision_is_accelerates_and_stays_within_a_call(
    base_dir: Path, examples: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With bf16 the losses are near those of fp32 and not the same; afterwards it is fp32 again."""

    def curve() -> list[float]:
        settings = TrainSettings(steps=8, batch_size=8, learning_rate=1e-3)
        return losses(train_lora(load_base(base_dir), examples, LORA, TrainRun(settings, "x"))[1])

    full = curve()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    mixed = curve()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(InputError, match="found 'fp16'; expected no or bf16"):
        curve()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert mixed != full
    assert mixed == pytest.approx(full, rel=0.02)
    assert curve() == full


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
    long = ("Anna " * 30, "")
    with pytest.raises(InputError, match="1 of 2 examples are longer than the context of 20"):
        encode(tokenizer, "{input}", [*good, long], 20, "task")
    assert encode(tokenizer, "{input}", [long, *good], 20, "task", leave_out_long=True) == encode(
        tokenizer, "{input}", good, 20, "task"
    )
    with pytest.raises(InputError, match="1 of 1 examples are longer than the context of 20"):
        encode(tokenizer, "{input}", [long], 20, "task", leave_out_long=True)
