"""An artifact is what was exported or is refused, and the same inputs give the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from caliport.core.directories import check_files, read_manifest
from caliport.core.errors import InputError
from caliport.core.files import file_hash
from caliport.export.artifact import Artifact
from caliport.validation.runners import executorch as executorch_runner
from caliport.validation.runners import onnx as onnx_runner
from caliport.validation.runners.open import open_runner, stock_generate
from tests.export.conftest import export_both
from tests.exports import to_onnx
from tests.forking import forked

RUNTIMES = ("onnx", "executorch")


@pytest.fixture(params=RUNTIMES)
def copy(request: pytest.FixtureRequest, artifacts: Path, tmp_path: Path) -> Path:
    return shutil.copytree(artifacts / request.param, tmp_path / request.param)


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_two_processes_give_the_same_bytes(
    artifacts: Path, base_dir: Path, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    """Every file of both runtimes, the manifest too; no field of it is left out."""
    again = export_both(base_dir, adapter_dirs[0], tmp_path / "again", seed=2)
    first, second = bytes_of(artifacts), bytes_of(again)
    assert first.keys() == second.keys()
    assert [name for name, content in first.items() if second[name] != content] == []
    for runtime in RUNTIMES:
        assert "seconds" not in read_manifest(again / runtime)


def test_the_manifest_records_every_file(copy: Path) -> None:
    found = bytes_of(copy)
    del found["manifest.json"]
    assert read_manifest(copy)["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in found.items()
    }
    check_files(copy)


def openers(copy: Path) -> list[Callable[[], object]]:
    """Everything that opens an artifact."""
    opened: list[Callable[[], object]] = [
        lambda: open_runner(Artifact.read(copy), 1),
        lambda: stock_generate(Artifact.read(copy), "a", 1),
    ]
    if copy.name == "onnx":
        return [
            *opened,
            lambda: onnx_runner.OnnxRunner(copy),
            lambda: onnx_runner.generate(copy, "a", 1),
            lambda: onnx_runner.generate_ids(copy, [5], 1),
        ]
    return [
        *opened,
        lambda: executorch_runner.ExecuTorchRunner(copy),
        lambda: executorch_runner.generate(copy, "a", 1),
    ]


def refused(copy: Path, name: str, says: str) -> None:
    for load in openers(copy):
        with pytest.raises(InputError) as caught:
            load()
        assert str(caught.value).startswith(f"{copy / name}: ")
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_any_changed_file_is_refused(copy: Path) -> None:
    """One bit of each file, in place: same size, and the time set back to what it was."""
    open_runner(Artifact.read(copy), 1)
    for name in read_manifest(copy)["files"]:
        path, before = copy / name, (copy / name).stat()
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[len(changed) // 2] ^= 1
        path.write_bytes(bytes(changed))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        refused(copy, name, "manifest.json records")
        path.write_bytes(whole)
    check_files(copy)


def test_files_that_are_cut_gone_or_added_are_refused(copy: Path) -> None:
    tokenizer = copy / "tokenizer.json"
    whole = tokenizer.read_bytes()
    tokenizer.write_bytes(whole[:-1])
    refused(copy, "tokenizer.json", f"{len(whole) - 1} bytes, manifest.json records {len(whole)}")
    tokenizer.unlink()
    refused(copy, "tokenizer.json", "no such file, but manifest.json records it")
    tokenizer.write_bytes(whole)
    (copy / "added_tokens.json").write_text("{}")
    refused(copy, "added_tokens.json", "not recorded in manifest.json")
    (copy / "added_tokens.json").rename(copy / ".hidden")
    check_files(copy)


@pytest.mark.parametrize("files", [None, {}, {"model.onnx": 3}, [1]])
def test_a_manifest_without_hashes_is_refused(copy: Path, files: object) -> None:
    manifest = read_manifest(copy) | {"files": files}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    refused(copy, "manifest.json", "expected")


def test_the_command_refuses_in_one_line(copy: Path, base_dir: Path, tmp_path: Path) -> None:
    card = copy / "README.md"
    card.write_bytes(card.read_bytes() + b"\n")
    done = forked("validate", copy, "--base", base_dir, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith(f"caliport: {card}: ")
    assert done.stderr.count("\n") == 1


def test_nothing_is_hashed_twice(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even after the directory was renamed, as a finished one is."""
    hashed: list[str] = []
    digest = hashlib.file_digest

    def count(stream: object, name: str) -> object:
        hashed.append(stream.name)  # type: ignore[attr-defined]
        return digest(stream, name)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", count)
    monkeypatch.setattr("caliport.core.files._SETTLED", 0)
    check_files(copy)
    assert len(hashed) == len(read_manifest(copy)["files"])
    open_runner(Artifact.read(copy), 1)
    open_runner(Artifact.read(copy), 1)
    moved = copy.rename(tmp_path / "moved")
    check_files(moved)
    assert len(hashed) == len(read_manifest(moved)["files"])
    tokenizer = moved / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes())
    check_files(moved)
    assert len(hashed) == len(read_manifest(moved)["files"]) + 1


def test_a_file_changed_within_a_clock_tick_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"one", b"two", b"six"):
        path.write_bytes(content)
        assert file_hash(path) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_weights_that_are_not_finite_are_refused(
    base_dir: Path, tmp_path: Path, precision: str
) -> None:
    """Rounded to 4 bits, they would look like any others."""
    shutil.copytree(base_dir, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1\.mlp\.up_proj\.weight: found NaN or infinite weights"):
        to_onnx(tmp_path / "base", tmp_path / "art", precision=precision)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
