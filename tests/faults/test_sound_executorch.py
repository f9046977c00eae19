"""No gate fails for a sound artifact for ExecuTorch, whatever its weights and prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from caliport.export.quantization.choices import PRECISIONS
from tests.faults.checking import check, failed
from tests.faults.scene import Scene
from tests.faults.table import SEEDS


@pytest.mark.parametrize("seed", SEEDS)
def test_sound_artifacts_pass(seed: int, tmp_path: Path) -> None:
    scene = Scene.build(tmp_path, seed)
    for precision in PRECISIONS:
        result = check(scene, "executorch", tmp_path / precision, None, precision)
        assert not failed(result), precision
        assert result.passed
