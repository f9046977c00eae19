"""The scene of the faults, built once."""

from __future__ import annotations

import pytest

from tests.faults.scene import Scene


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene.build(tmp_path_factory.mktemp("scene"))
