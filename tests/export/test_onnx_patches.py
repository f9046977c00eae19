"""Each patch for ONNX: that it is still needed, still fits, and is left out where untested."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from caliport.core.patching import is_tested, quiet
from caliport.export.onnx.graph import patches
from caliport.export.onnx.graph.patches import layers_as_operators, watched_rotary
from caliport.validation.runners.onnx import OnnxRunner
from tests.exports import to_onnx
from tests.lowerings import lowered_anew

PATCHES = [layers_as_operators, watched_rotary]


def test_every_patch_was_tested_with_what_is_installed() -> None:
    files = {path.stem for path in Path(patches.__file__).parent.glob("*.py")}
    assert files - {"__init__"} == {module.__name__.split(".")[-1] for module in PATCHES}
    for module in PATCHES:
        assert is_tested(module.RELEASES), module.__name__
        assert "\nUpstream: " in (module.__doc__ or "")


def test_a_linear_layer_is_still_translated_to_standard_operators() -> None:
    linear = nn.Linear(8, 4, bias=False)

    def operators() -> list[str]:
        with quiet(), torch.no_grad():
            program = torch.export.export(linear, (torch.ones(2, 8),), strict=False)
            model: Any = torch.onnx.export(program, optimize=False, verbose=False)
        return [node.op_type for node in model.model.graph]

    assert "FusedMatMul" not in operators()
    with layers_as_operators.layers_as_operators(linear):
        assert operators() == ["FusedMatMul"]
    assert "FusedMatMul" not in operators()


def test_operators_are_not_for_a_release_of_torch_that_was_not_tested(
    refused: Callable[..., None],
) -> None:
    refused(lambda: layers_as_operators.layers_as_operators(nn.Linear(8, 4)), torch="2.14.0")


def _turning(directory: Path) -> list[bool]:
    """Of each attention operator, whether it turns queries and keys itself."""
    graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
    return [
        any(a.name == "do_rotary" and a.i == 1 for a in node.attribute)
        for node in graph.node
        if node.op_type == "GroupQueryAttention"
    ]


def test_rotary_embeddings_that_are_not_watched_stay_in_the_graph(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]]
) -> None:
    watched = to_onnx(base_dir, tmp_path / "watched", context=48)
    assert _turning(watched) == [True, True]
    monkeypatch.setattr(watched_rotary, "RELEASES", ("transformers==4.0.*",))
    with lowered_anew():
        plain = to_onnx(base_dir, tmp_path / "plain", context=48)
    assert _turning(plain) == [False, False]
    found, expected = (OnnxRunner(out, threads=1).prefill(prompts[2]) for out in (plain, watched))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
