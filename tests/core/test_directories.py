"""Finished directories: what is there, and what is not there any more."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from caliport.core.directories import MANIFEST, check_files, key, read_manifest, up_to_date
from caliport.core.errors import InputError
from caliport.core.outputs import new_directory

LARGE = 2 * 10**6


@pytest.fixture
def made(tmp_path: Path) -> Path:
    with new_directory(tmp_path / "made", "export", {}, {}) as (partial, _):
        (partial / "weights").write_bytes(bytes(LARGE))
        (partial / "small").write_text("one")
    return tmp_path / "made"


def is_there(directory: Path) -> bool:
    return up_to_date(directory, key("export", {}, {}))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda made: (made / "weights").unlink(), "no such file"),
        (lambda made: (made / "weights").write_bytes(bytes(LARGE - 1)), "1999999 bytes"),
        (lambda made: (made / "small").write_text("two"), "SHA-256"),
        (lambda made: (made / "weights").write_bytes(b"1" * LARGE), "SHA-256"),
        (lambda made: (made / "more").write_text(""), "not recorded"),
    ],
    ids=["gone", "cut", "changed", "large-changed", "added"],
)
def test_a_directory_without_its_files_is_not_up_to_date(
    made: Path, harm: Callable[[Path], object], says: str
) -> None:
    assert is_there(made)
    assert not up_to_date(made, "another key")
    harm(made)
    assert not is_there(made)
    with pytest.raises(InputError, match=says):
        check_files(made)


@pytest.mark.parametrize("text", ["[" * 10**5, "[]", '{"a": NaN}', "{", '{"a": "\\ud800"}'])
def test_a_manifest_that_is_none(made: Path, text: str) -> None:
    (made / MANIFEST).write_text(text)
    assert not is_there(made)
    with pytest.raises(InputError, match=r"manifest\.json: "):
        read_manifest(made)


def test_a_manifest_and_files_elsewhere(made: Path, tmp_path: Path) -> None:
    outside = (made / "weights").rename(tmp_path / "outside")
    (made / "weights").symlink_to(outside)
    with pytest.raises(InputError, match="weights: is outside"):
        check_files(made)
    (made / MANIFEST).rename(tmp_path / "manifest")
    os.mkfifo(made / MANIFEST)
    with pytest.raises(InputError, match="not a regular file"):
        read_manifest(made)
    assert not is_there(made)
    (made / MANIFEST).unlink()
    (made / MANIFEST).symlink_to("/dev/zero")
    with pytest.raises(InputError, match="not a regular file"):
        read_manifest(made)
    assert json.loads((tmp_path / "manifest").read_text())["stage"] == "export"
