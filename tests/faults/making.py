"""Make an artifact with one fault, by the exporter itself, and hide it from the hash check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from caliport.core.directories import MANIFEST, content_hash, read_manifest
from caliport.core.files import file_hash
from caliport.export.decoder.stored import Weights
from caliport.export.executorch.steps import Lowered
from caliport.validation.runners.runner import Runner
from tests.exports import to_executorch, to_onnx
from tests.faults.scene import Scene, Tensors, edit_tensors
from tests.lowerings import lowered_anew

Patch = Callable[[pytest.MonkeyPatch], None]
EXPORT = {"executorch": to_executorch, "onnx": to_onnx}
_LOWERED: dict[str, Lowered] = {}
_DRAWN: dict[str, Any] = {}


def nothing(_: Any) -> None:
    """In a patch by runtime: a runtime's exporter is left as it is."""


@dataclass(frozen=True)
class Fault:
    """One fault, as small and as real as can be.

    Attributes:
        name: Of what is wrong.
        stage: That lost the accuracy, and that the gates should name.
        precision: Of the artifact.
        base: Changes a copy of the base, from which the artifact is then made.
        adapter: Changes the tensors of a copy of the adapter, likewise; all of them None for none.
        weights: Changes the weights that ship, after they were folded and quantized.
        patch: Changes the exporter while it runs, by runtime.
        after: Changes the files of the finished artifact, by runtime.
        runner: Changes the runner, where no artifact can have the fault.
        drawn: Whether the graph is of the usual form, although ``base`` or ``patch`` is given.
        recorded: Whether the manifest says from what the artifact was really made.
        taken_for: The stage that the gates name where they name a wrong one.
    """

    name: str
    stage: str
    precision: str = "int8"
    base: Callable[[Path], None] | None = None
    adapter: Callable[[Tensors], Tensors] | None = None
    weights: Callable[[Weights], None] | None = None
    patch: dict[str, Patch] | None = None
    after: dict[str, Callable[[Path], None]] | None = None
    runner: Callable[[Runner], Runner] | None = None
    drawn: bool = False
    recorded: bool = False
    taken_for: str | None = None

    @property
    def named(self) -> str:
        """The stage that the gates name."""
        return self.taken_for or self.stage

    def changes_tracing(self, runtime: str) -> bool:
        """Whether ``base`` or ``patch`` may give the graph another form."""
        return self.base is not None or (self.patch or {}).get(runtime, nothing) is not nothing


def everywhere(patch: Patch) -> dict[str, Patch]:
    """The same change to the exporter for both runtimes."""
    return dict.fromkeys(EXPORT, patch)


def put(weights: Weights, name: str, value: Tensor) -> None:
    """Let another tensor ship under a name."""
    weights.put(f"{name}, changed", [value], len(value))
    weights._stored[name] = weights[f"{name}, changed"]


def make(fault: Fault | None, scene: Scene, runtime: str, out: Path, precision: str = "") -> Path:
    """Export, with a fault where one is given, and make the manifest agree with the files."""
    base, adapter = scene.base, scene.adapter
    if fault is not None and fault.base is not None:
        base = _copy(base, out.parent / f"{out.name}-base")
        fault.base(base)
    if fault is not None and fault.adapter is not None:
        adapter = _copy(adapter, out.parent / f"{out.name}-adapter")
        edit_tensors(adapter, fault.adapter)
    form = precision or (fault.precision if fault is not None else "int8")
    with lowered_anew(), pytest.MonkeyPatch.context() as monkeypatch:
        if fault is not None and fault.weights is not None:
            _change_weights(monkeypatch, fault.weights)
        if fault is not None and fault.patch is not None:
            fault.patch[runtime](monkeypatch)
        if fault is None or fault.drawn or not fault.changes_tracing(runtime):
            _lower_once(monkeypatch, form)
        EXPORT[runtime](base, out, adapter=adapter, precision=form)
    if fault is not None:
        if fault.after is not None:
            fault.after[runtime](out)
        agree(out, None if fault.recorded else scene)
    return out


def _change_weights(monkeypatch: pytest.MonkeyPatch, change: Callable[[Weights], None]) -> None:
    from caliport.export.decoder import shipped

    make = shipped.store

    def store(*args: object) -> Weights:
        weights = make(*args)  # type: ignore[arg-type]
        change(weights)
        return weights

    monkeypatch.setattr(shipped, "store", store)


def _lower_once(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Weights play no part in a graph until it is written, so that all of one shape share it."""
    import onnx_ir

    from caliport.export.executorch import lower as executorch
    from caliport.export.onnx import lower as onnx

    lower, draw = executorch.lower_skeleton, onnx.graph_of

    def lowered(*args: Any, **options: Any) -> Lowered:
        if form not in _LOWERED:
            _LOWERED[form] = lower(*args, **options)
        return _LOWERED[form]

    def drawn(*args: Any) -> onnx_ir.Model:
        if form not in _DRAWN:
            _DRAWN[form] = onnx_ir.to_proto(draw(*args))
        return onnx_ir.from_proto(_DRAWN[form])

    monkeypatch.setattr(executorch, "lower_skeleton", lowered)
    monkeypatch.setattr(onnx, "graph_of", drawn)


def _copy(directory: Path, out: Path) -> Path:
    shutil.copytree(directory, out)
    return out


def agree(directory: Path, scene: Scene | None) -> None:
    manifest = read_manifest(directory)
    for name in manifest["files"]:
        path = directory / name
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    if scene is not None:
        manifest["inputs"] = {
            "base": content_hash(scene.base),
            "adapter": content_hash(scene.adapter),
        }
    (directory / MANIFEST).write_text(json.dumps(manifest))
