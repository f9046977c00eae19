"""Tiny valid inputs that every bad one is made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from caliport.core.directories import MANIFEST, files_in
from caliport.core.files import file_hash

BASE = ("--base", "base")
BOTH = (*BASE, "--adapter", "first", "--adapter", "second")
DATA = ("--data", "data.jsonl", "--steps", "1", "--batch-size", "2")
EXPORT = ("export", "--base", "base", "--adapter", "first")
RECIPE = """
name: tiny
data:
  source: files
  files:
    a: {train: data.jsonl, validation: data.jsonl, prompt: "A {input}"}
    b: {train: data.jsonl, validation: data.jsonl, prompt: "B {input}"}
    a_b: {train: data.jsonl, validation: data.jsonl, prompt: "AB {input}"}
base: {path: base}
adapters: {a: first, b: second}
compositions: {a_b: [a, b]}
calibration: {examples: 4, methods: [linear]}
evaluation: {examples: 2, max_new_tokens: 2, batch_size: 2}
export: {runtimes: [onnx], precisions: [fp32], context: 48}
validation: {examples: 2, repetitions: 2, threads: 1}
"""
LINES = [{"input": f"meet {n}", "output": "tennis", "features": ["x"]} for n in range(4)]
COMMANDS: tuple[tuple[str, ...], ...] = (
    (*EXPORT, "--runtime", "onnx", "--precision", "int4", "--out", "onnx"),
    ("export", "--base", "base", "--bundle", "one=first", "--runtime", "onnx", "--out", "bundle"),
    ("run", "recipe.yaml"),
    ("baseline", "store", "runs/tiny", "baseline.json"),
    (*EXPORT, "--runtime", "executorch", "--out", "pte"),
)
"""What makes the rest, in a directory that has a base, adapters, data and a recipe."""


def start(root: Path) -> None:
    """Write a base, two adapters, data and a recipe."""
    import torch

    from caliport.calibrate.training.small_base import BaseShape, build_model, build_tokenizer
    from tests.conftest import TEXTS, random_adapter
    from tests.ggufs import write_gguf

    root.mkdir(parents=True)
    tokenizer = build_tokenizer(TEXTS, 300)
    model = build_model(tokenizer, BaseShape(300, 32, 32, 1, 2, 2, 48), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    write_gguf(root / "base", root / "tiny.gguf")
    for seed, name in enumerate(("first", "second")):
        random_adapter(root / "base", root / name, seed, rank=2)
        shutil.rmtree(root / name / "README.md", ignore_errors=True)
    (root / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (root / "recipe.yaml").write_text(RECIPE)


def sign(directory: Path) -> None:
    """Let a manifest record the files as they are now, as whoever changed them could."""
    path = directory / MANIFEST
    if not path.is_file() or path.is_symlink():
        return
    manifest = json.loads(path.read_text())
    files = {
        name: file for name, file in files_in(directory).items() if file.stat().st_size < 10**8
    }
    manifest["files"] = {
        name: {"bytes": file.stat().st_size, "sha256": file_hash(file)}
        for name, file in files.items()
    }
    path.write_text(json.dumps(manifest))
