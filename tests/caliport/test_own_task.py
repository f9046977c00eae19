"""Every adapter on its own task, with and without it, before anything is composed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from forking import forked

from caliport.calibrate import LowRankUpdate, read_peft, write_peft
from caliport.calibrate.training.loop import TrainRun, TrainSettings
from caliport.calibrate.training.lora import LoraSettings, train_lora
from caliport.core.checkpoints import load_base, load_tokenizer
from caliport.core.outputs import new_directory
from caliport.stages.sources import Source
from caliport.validation.records.audit import AuditReport
from caliport.validation.records.own_task import OwnTask
from caliport.validation.records.reports import AUDIT, read_result


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "data.jsonl"
    rows = [{"input": f"Anna {i}", "output": "Tom y Anna"} for i in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_an_audit_scores_adapters_on_their_own_tasks(
    base_dir: Path, data: Path, tmp_path: Path
) -> None:
    model = load_base(base_dir)
    encoded = Source(data, "Say: {input}").encoded(load_tokenizer(base_dir), model)
    run = TrainRun(TrainSettings(steps=20, batch_size=6, learning_rate=1e-2), "x")
    learned, _ = train_lora(model, encoded, LoraSettings(4, 8, 0.0), run)
    names = learned.modules
    idle = LowRankUpdate(
        {n: torch.ones_like(learned.a[n]) for n in names},
        {n: 1e-6 * torch.ones_like(learned.b[n]) for n in names},
    )
    for name, update in (("learned", learned), ("idle", idle)):
        with new_directory(tmp_path / name, "lora", {}, {}) as (partial, extra):
            write_peft(update, partial, base=str(base_dir))
            extra["prompt"] = "Say: {input}"
    flags = ("--base", base_dir, "--data", data, "--data", data, "--out", "out")
    done = forked("audit", "learned", "idle", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (audit,) = read_result(AuditReport, tmp_path / "out" / AUDIT).compositions.values()
    verdicts = {name: own.matters for name, own in audit.own.items()}
    assert verdicts == {"learned": True, "idle": False}
    learned_own, idle_own = audit.own["learned"], audit.own["idle"]
    assert learned_own.loss[1] < 0.9 * learned_own.loss[0]
    assert idle_own.loss[0] == learned_own.loss[0], "the same base on the same examples"
    assert idle_own.loss[1] == pytest.approx(idle_own.loss[0], rel=1e-3)
    said = " ".join(done.stdout.split())
    assert f"adapter idle: {idle_own.text}" in said
    assert "it barely changes its own task" in said
    page = next((tmp_path / "out").glob("*.html")).read_text()
    assert idle_own.text in page
    assert read_peft(tmp_path / "idle").modules == names


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--base", "BASE"], "--base and --data go together"),
        (["--data", "DATA"], "--base and --data go together"),
        (["--base", "BASE", "--data", "DATA"], "found 1 --data for 2 adapters; expected one each"),
    ],
)
def test_examples_that_do_not_fit(
    flags: list[str],
    says: str,
    base_dir: Path,
    adapter_dirs: list[Path],
    data: Path,
    tmp_path: Path,
) -> None:
    places = {"BASE": base_dir, "DATA": data}
    done = forked("audit", *adapter_dirs, *(places.get(f, f) for f in flags), cwd=tmp_path)
    assert done.returncode == 2
    assert says in " ".join(done.stderr.split())
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("loss", "matters", "says"),
    [
        ((2.86, 0.24), True, "on 8 examples of its own task"),
        ((1.0, 0.9), True, "own task"),
        ((1.0, 0.95), False, "it barely changes its own task"),
        ((1.0, 1.2), False, "it makes its own task worse"),
        ((0.0, 0.0), True, "own task"),
    ],
)
def test_what_is_called_barely(loss: tuple[float, float], matters: bool, says: str) -> None:
    own = OwnTask(examples=8, loss=loss, metric="rougeL", score=(1.0, 2.0))
    assert own.matters is matters
    assert says in own.text
