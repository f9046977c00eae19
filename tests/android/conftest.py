"""What only tests of devices share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """Files that look like an artifact, in a directory whose name a shell would take apart."""
    directory = tmp_path / "it's $(touch pwned); an artifact"
    (directory / "sub folder").mkdir(parents=True)
    (directory / "model.onnx").write_bytes(b"model")
    (directory / "genai_config.json").write_bytes(b'{"model": {}}')
    (directory / "sub folder" / "model.onnx.data").write_bytes(os.urandom(100_000))
    return directory
