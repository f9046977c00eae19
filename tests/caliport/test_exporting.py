"""``caliport export --bundle`` and ``caliport sensitivity`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from caliport.validation.runners.executorch import ExecuTorchRunner, generate
from caliport.validation.runners.onnx import OnnxRunner
from tests.exports import text_of
from tests.forking import forked


def test_bundle_from_flags(one_layer: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base_dir, (one, two) = one_layer
    done = forked(
        "export", "--base", base_dir, "--runtime", "executorch", "--precision", "int4",
        "--bundle", f"first={one}", "--bundle", f"second={two}",
        "--share", f"task0={one}", "--out", tmp_path / "out", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["lowering"]["methods"] == ["forward", "first", "second"]
    assert manifest["lowering"]["sizes"]["compositions"]["first"] == 0, "all of it is shared"
    logits = [
        ExecuTorchRunner(tmp_path / "out", method=name).prefill([5, 6, 7])
        for name in ("forward", "first", "second")
    ]
    assert abs(logits[0] - logits[1]).max() > 0.01 < abs(logits[1] - logits[2]).max()
    assert generate(tmp_path / "out", "Anna and", 4)
    flags = ("validate", "out", "--base", base_dir, "--no-latency")
    done = forked(
        *flags, "--bundle", f"first={one}", "--bundle", f"second={two}",
        "--share", f"task0={one}", "--out", "checked", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "checked/parity.json").read_text())["artifacts"]
    assert [row["composition"] for row in rows] == ["base alone", "first", "second"]
    assert rows[0]["notes"] == []
    assert "first was not checked with it" in rows[1]["notes"][0]
    assert rows[1]["parts"]["shared adapters"] > 0
    assert sum(rows[1]["parts"].values()) == rows[1]["bytes"]
    done = forked(*flags, "--bundle", f"first={one}", cwd=tmp_path)
    assert done.returncode == 2
    assert "--share task0=DIR is missing; first stands on that adapter" in done.stderr


def test_onnx_bundle_from_flags_and_one_more(
    base_dir: Path, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    one, two = adapter_dirs
    flags = ("--base", base_dir, "--runtime", "onnx", "--precision", "int4")
    layer = "model.layers.1.mlp.down_proj"
    done = forked(
        "export", *flags, "--bundle", f"first={one}", "--int8-layer", layer, "--out", "out",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "out: needs about" in done.stdout
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["quantization"]["int8_layers"] == [layer]
    done = forked("export", "--into", "out", "--bundle", f"second={two}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    logits = [
        OnnxRunner(tmp_path / "out", adapter=adapter).prefill([5, 6, 7])
        for adapter in (None, *(tmp_path / f"out/{n}.onnx_adapter" for n in ("first", "second")))
    ]
    assert abs(logits[0] - logits[1]).max() > 0.01 < abs(logits[1] - logits[2]).max()
    done = forked("export", "--into", "out", "--base", base_dir, cwd=tmp_path)
    assert done.returncode == 2
    assert "--into only goes with --bundle NAME=DIR" in done.stderr
    flags = ("validate", "out", "--base", base_dir, "--no-latency")
    done = forked(*flags, "--bundle", f"second={two}", "--out", "checked", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "checked/parity.json").read_text())["artifacts"]
    assert [row["composition"] for row in rows] == ["base alone", "second"]
    assert rows[0]["notes"] == ["not checked, for want of --bundle NAME=DIR: first"]
    done = forked(*flags, "--bundle", f"first={two}", cwd=tmp_path)
    assert done.returncode == 1, "a composition passed for another"
    for wrong, reason in (
        (("--adapter", one), "is a bundle of first, second; expected --bundle NAME=DIR"),
        (("--bundle", f"third={one}"), "out has no such composition, only first, second"),
    ):
        done = forked(*flags, *wrong, cwd=tmp_path)
        assert done.returncode == 2
        assert reason in done.stderr


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--bundle", "first"), "--bundle: found 'first', expected NAME=DIR"),
        (("--bundle", "a=x", "--bundle", "a=y"), "--bundle: found a twice"),
        (("--bundle", "forward=x"), "found the name 'forward'"),
        (("--bundle", "../up=x"), "found the name '../up'"),
        (("--share", "a=x"), "--share goes with --bundle"),
        (("--bundle", "a=x", "--adapter", "x"), "--adapter does not go with --bundle"),
    ],
)
def test_wrong_bundles_end_in_one_line(
    base_dir: Path, tmp_path: Path, flags: tuple[str, ...], reason: str
) -> None:
    done = forked(
        "export", "--base", base_dir, "--runtime", "executorch", *flags, "--out", "out",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_sensitivity_names_layers_to_keep(base_dir: Path, tmp_path: Path) -> None:
    done = forked(
        "sensitivity", "--base", base_dir, "--share", 0.2, "--out", "s.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "s.json").read_text())
    losses = [layer["divergence"] for layer in found["layers"]]
    assert losses == sorted(losses, reverse=True)
    assert found["int8_layers"]
    for name in found["int8_layers"]:
        assert f"--int8-layer {name}" in done.stderr
    assert "curve" not in found


def test_sensitivity_after_calibrated_rounding(base_dir: Path, tmp_path: Path) -> None:
    text_of(tmp_path, 60, 256)
    flags = ["--calibration", "text.txt", "--calibration-tokens", 256, "--out", "s.json"]
    done = forked("sensitivity", "--base", base_dir, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["curve"][0]["bytes"] == 0
    losses = [point["kl"] for point in found["curve"]]
    assert losses[-1] < 0.1 * losses[0]
    assert "Loss of the whole model" in done.stdout + done.stderr
    both = forked(
        "sensitivity", "--base", base_dir, *flags[:2], "--prompt", "{input}", cwd=tmp_path
    )
    assert both.returncode == 2
    assert "--prompts and --prompt do not go with --calibration" in both.stderr
