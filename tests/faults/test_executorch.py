"""Every fault in an artifact for ExecuTorch is caught, and its stage named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.checking import check, failed
from tests.faults.making import Fault
from tests.faults.scene import Scene
from tests.faults.table import FAULTS
from tests.sampling import thorough

# A graph of another form is lowered anew, in some twenty seconds. Those that break the attention,
# the rounding of weights and that of activations are in every run; ONNX has all of them.
LOWERED = ("mask one token short", "group size doubled", "activations quantized per tensor")


def _sampled(fault: Fault) -> Any:
    anew = fault.changes_tracing("executorch") and not fault.drawn
    return thorough(fault, name=fault.name, left_out=anew and fault.name not in LOWERED)


@pytest.mark.parametrize("fault", map(_sampled, FAULTS))
def test_a_fault_is_caught_and_named(scene: Scene, fault: Fault, tmp_path: Path) -> None:
    result = check(scene, "executorch", tmp_path / "artifact", fault)
    assert failed(result)
    assert result.lost_at == fault.named
