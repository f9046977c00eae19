"""Android's archive of ONNX Runtime: only what a build needs is unpacked, within bounds."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from caliport.android_harness.toolchain import build
from caliport.core.errors import InputError

NAME = "onnxruntime-android-1.31.1.aar"
LIBRARY = "jni/arm64-v8a/libonnxruntime.so"


def archive(place: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(place / NAME, "w") as made:
        for name, content in files.items():
            made.writestr(name, content)
    return place / NAME


def test_only_what_is_needed_is_unpacked(tmp_path: Path) -> None:
    unneeded = {"../../out": b"", "/abs": b"", "headers/../../x": b"", "classes.jar": b""}
    made = archive(tmp_path, {"headers/a_b.h": b"h", LIBRARY: b"so", **unneeded})
    build._unpack(made, tmp_path / "cache" / "out")
    found = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    expected = ["cache/out/headers/a_b.h", f"cache/out/{LIBRARY}", NAME]
    assert found == sorted(map(Path, expected))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def changed(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"content", b"CONTENT"))


@pytest.mark.parametrize(
    ("change", "said"),
    [(cut, "not a whole archive"), (changed, "not a whole archive"), (Path.unlink, "No such file")],
)
def test_a_damaged_archive(change: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    made = archive(tmp_path, {LIBRARY: b"content"})
    change(made)
    with pytest.raises(InputError, match=said):
        build._unpack(made, tmp_path / "out")


def test_too_many_and_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = archive(tmp_path, {f"headers/{i}.h": b"" for i in range(201)})
    with pytest.raises(InputError, match="201 headers and libraries of 0 bytes, expected at most"):
        build._unpack(made, tmp_path / "out")
    made = archive(tmp_path, {LIBRARY: bytes(2000)})
    monkeypatch.setattr(build, "_AAR_BYTES", 10_000)
    build._unpack(made, tmp_path / "out")
    monkeypatch.setattr(build, "_AAR_BYTES", 1000)
    with pytest.raises(InputError, match=r"2,1.. bytes, expected at most 1,000"):
        build._unpack(made, tmp_path / "out")
