"""``caliport audit``, from adapters to its files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_adapter

from caliport.calibrate import LowRankUpdate, read_peft, write_peft
from caliport.calibrate.merges.exact import exact
from caliport.calibrate.merges.linear import linear
from caliport.calibrate.merges.registry import MERGES
from caliport.core.errors import InputError
from caliport.run.audit import audit_composition, write_audit
from caliport.validation.records.audit import AuditReport
from caliport.validation.records.reports import AUDIT, read_result
from tests.forking import forked


def test_command_end_to_end(adapter_dirs: list[Path], tmp_path: Path) -> None:
    done = forked("audit", *adapter_dirs, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [AUDIT, "report.html"]
    report = read_result(AuditReport, tmp_path / "out" / AUDIT)
    ((title, audit),) = report.compositions.items()
    assert title == "task0 + task1"
    assert audit.weights == {"task0": 0.5, "task1": 0.5}
    assert [merge.merge for merge in audit.merges] == list(MERGES)
    assert {module.layer for module in audit.modules} == {0, 1}
    assert len(audit.modules) == 14
    for merge in audit.merges:
        assert f"{merge.merge}: {merge.text}" in " ".join(done.stdout.split())
    assert "q_proj" in done.stdout
    assert "linear: far from exact" in done.stdout
    assert "<h3>task0 + task1</h3>" in (tmp_path / "out" / "report.html").read_text()

    updates = [read_peft(path) for path in adapter_dirs]
    merged, wanted = linear(updates), exact(updates)
    gone = torch.cat([(merged.delta(n) - wanted.delta(n)).flatten() for n in wanted.modules])
    whole = torch.cat([wanted.delta(n).flatten() for n in wanted.modules])
    found = next(merge for merge in audit.merges if merge.merge == "linear")
    assert found.error == pytest.approx(float(gone.norm() / whole.norm()), rel=1e-4)


def test_nothing_is_written_unasked_and_weights_count(
    adapter_dirs: list[Path], tmp_path: Path
) -> None:
    weights = ("--weight", "1", "--weight=-0.5")
    done = forked("audit", *adapter_dirs, *weights, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1·task0 + -0.5·task1" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ONE"], "found 1, expected 2 or more"),
        (["ONE", "gone"], "gone: no such directory"),
        (["ONE", "TWO", "--weight", "1"], "1 weights for 2 adapters; expected one each"),
        (["ONE", "TWO", "--weight", "nan", "--weight", "1"], "--weight is nan"),
        ([], "Missing argument"),
        (["ONE", "OTHER"], "expected adapters of one base"),
    ],
)
def test_bad_input_ends_in_one_line(
    arguments: list[str], says: str, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    one = read_peft(adapter_dirs[0])
    larger = {name: torch.cat([b, b]) for name, b in one.b.items()}
    write_peft(LowRankUpdate(one.a, larger), tmp_path / "other")
    places = {"ONE": adapter_dirs[0], "TWO": adapter_dirs[1], "OTHER": tmp_path / "other"}
    found = [places.get(a, a) for a in arguments]
    done = forked("audit", *found, "--out", "out", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("caliport: ")
    assert says in line
    assert not (tmp_path / "out").exists()


def test_adapters_of_different_ranks_and_modules(
    base_dir: Path, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    """What a merge refuses is a finding; modules of one adapter alone have no overlap."""
    random_adapter(base_dir, tmp_path / "small", seed=9, rank=2, target_modules=["q_proj"])
    adapters = {"large": adapter_dirs[0], "small": tmp_path / "small"}
    audit = audit_composition(adapters, [0.75, 0.25])
    by_name = {merge.merge: merge for merge in audit.merges}
    assert by_name["linear"].verdict == "does not apply"
    assert by_name["linear"].error is None
    assert "only one of adapters 1 and 2" in by_name["linear"].text
    assert by_name["exact"].verdict == "exact"
    for module in audit.modules:
        shared = module.component == "q_proj"
        assert set(module.adapters) == ({"large", "small"} if shared else {"large"})
        assert len(module.overlaps) == shared
        assert "linear" not in module.merges
    write_audit({"both": audit}, tmp_path / AUDIT)
    assert read_result(AuditReport, tmp_path / AUDIT).compositions == {"both": audit}


def test_modules_come_in_the_order_of_layers(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(12)]
    for task in ("a", "b"):
        update = LowRankUpdate(
            {name: torch.randn(2, 4) for name in names},
            {name: torch.randn(3, 2) for name in names},
        )
        write_peft(update, tmp_path / task)
    audit = audit_composition({"a": tmp_path / "a", "b": tmp_path / "b"})
    assert [module.layer for module in audit.modules] == list(range(12))


def test_directories_of_one_name_stay_apart(adapter_dirs: list[Path], tmp_path: Path) -> None:
    for place, source in zip(("x", "y"), adapter_dirs, strict=True):
        shutil.copytree(source, tmp_path / place / "adapter")
    done = forked("audit", "x/adapter", "y/adapter", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0.5·adapter (1) + 0.5·adapter (2)" in done.stdout


def test_output_that_cannot_be_written(adapter_dirs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    audit = audit_composition(dict(zip("ab", adapter_dirs, strict=True)))
    with pytest.raises(InputError, match="is a file, expected a directory"):
        write_audit({"both": audit}, tmp_path / "file" / AUDIT)
