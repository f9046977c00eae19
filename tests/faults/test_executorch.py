"""Every fault in an artifact for ExecuTorch is caught, and its stage named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.checking import check, failed
from tests.faults.making import Fault
from tests.faults.scene import Scene
from tests.faults.table import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught_and_named(scene: Scene, fault: Fault, tmp_path: Path) -> None:
    result = check(scene, "executorch", tmp_path / "artifact", fault)
    assert failed(result)
    assert result.lost_at == fault.named
