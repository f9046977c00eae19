"""What a stage reads, by a hash of its content."""

from __future__ import annotations

from pathlib import Path

from caliport.core.directories import content_hash
from caliport.core.files import ADAPTER_WEIGHTS, MLX_WEIGHTS
from caliport.core.model_files.tensor_files import read_header


def input_hash(path: str | Path) -> str:
    """Content hash of a stage's input; the name of one that is not on this machine.

    Raises:
        InputError: An adapter whose weights do not fit their own header, before all is read.
    """
    for name in (ADAPTER_WEIGHTS, MLX_WEIGHTS):
        if (weights := Path(path) / name).exists():
            read_header(weights)
    return content_hash(Path(path)) if Path(path).exists() else f"name:{path}"
