"""LC and LC++ against the equations, what they train, and exact resume."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from calibrate import LowRankUpdate
from calibrate.batches import Encoded, Order, collate, encode
from calibrate.calibration import calibrate
from calibrate.correction import LC, LCPlusPlus, attached, components, corrected, frozen
from calibrate.lora import LoraSettings, train_lora
from calibrate.merge import linear
from calibrate.train import TrainSettings, fit, loss_of
from caliport_core.checkpoints import load_base, load_tokenizer
from caliport_core.errors import InputError


@pytest.fixture(scope="module")
def merged(adapter_dirs: list[Path]) -> LowRankUpdate:
    return linear([LowRankUpdate.from_peft(d) for d in adapter_dirs])


@pytest.fixture
def examples() -> list[Encoded]:
    draw = random.Random(1)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(5, 300) for _ in range(draw.randrange(low, high)))

    return [Encoded(tokens(3, 20), tokens(1, 9)) for _ in range(64)]


def randomised(correction: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    for parameter in correction.parameters():
        nn.init.normal_(parameter, std=0.05)
    return correction


@pytest.mark.parametrize("method", ["lc", "lc++"])
def test_equation(
    method: str, merged: LowRankUpdate, base_dir: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    """ΔW is Eq. 6 or 7 written out, and PEFT's logits of the saved directory are ours."""
    correction = randomised((LC if method == "lc" else LCPlusPlus)(components(merged)))
    update = frozen(merged, correction)
    for name in merged.modules:
        out, into = merged.shape(name)
        component = f"{name.rsplit('.', 1)[1]}-{out}x{into}"
        wanted = merged.b[name] @ merged.a[name]
        if method == "lc":
            for column in range(into):
                wanted[:, column] += correction.p[component]
        else:
            wanted = wanted + correction.p2[component] @ correction.p1[component]
        torch.testing.assert_close(update.delta(name), wanted.detach(), rtol=1e-4, atol=1e-5)
        assert update.rank(name) == merged.rank(name) + (1 if method == "lc" else 4)
    update.to_peft(tmp_path, base=str(base_dir))
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = load_base(base_dir)
    tokens = torch.tensor([prompts[2]])
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, tmp_path).eval()(tokens).logits
        with attached(model, merged.modules, corrected(merged, correction)):
            ours = model(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_parameter_counts(merged: LowRankUpdate) -> None:
    """One p per component, whatever the number of layers: Σ out, and 4·Σ(in + out)."""
    shapes = [merged.shape(n) for n in merged.modules if ".layers.0." in n]
    lc = sum(p.numel() for p in LC(components(merged)).parameters())
    lcpp = sum(p.numel() for p in LCPlusPlus(components(merged)).parameters())
    assert lc == sum(out for out, _ in shapes)
    assert lcpp == 4 * sum(out + into for out, into in shapes)


@pytest.mark.parametrize("correction", [LC, LCPlusPlus])
def test_starts_as_the_merge(correction: type[nn.Module], merged: LowRankUpdate) -> None:
    update = frozen(merged, correction(components(merged)))
    for name in merged.modules:
        torch.testing.assert_close(update.delta(name), merged.delta(name))


@pytest.mark.parametrize("method", ["lc", "lc++"])
def test_only_the_correction_learns(
    method: str, merged: LowRankUpdate, base_dir: Path, examples: list[Encoded]
) -> None:
    model = load_base(base_dir)
    before = {n: p.clone() for n, p in model.named_parameters()}
    settings = TrainSettings(steps=30, batch_size=16, learning_rate=1e-2)
    update, count, curve = calibrate(model, merged, method, examples, settings, method)
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.2
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    for name in merged.modules:  # what was merged is in there unchanged, in front
        rank = merged.rank(name)
        assert torch.equal(update.a[name][:rank], merged.a[name])
        assert torch.equal(update.b[name][:, :rank], merged.b[name])
    assert count < merged.parameter_count


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
        with attached(model, update.modules, lambda n: (update.a[n], update.b[n])):
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


def test_loss_that_is_not_finite_stops(base_dir: Path, examples: list[Encoded]) -> None:
    model = load_base(base_dir)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="loss is nan at step 0"):
        fit(model, model, examples, TrainSettings(steps=2, batch_size=4), "base")


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
