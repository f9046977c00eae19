"""Nothing that caliport did not make is ever replaced or removed."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from caliport.core.errors import InputError
from caliport.core.outputs import check_output, forced, new_directory


def make(out: Path, stage: str = "export", content: str = "ours") -> Path:
    with new_directory(out, stage, {}, {}) as (partial, _):
        (partial / "file").write_text(content)
    return out


def everything(place: Path) -> dict[str, str]:
    found = (path for path in place.rglob("*") if path.is_file())
    return {path.relative_to(place).as_posix(): path.read_text() for path in found}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's own directories, from inside of one."""
    place = tmp_path / "project"
    (place / "src").mkdir(parents=True)
    (place / "src" / "main.py").write_text("mine")
    (place / ".hidden").mkdir()
    (place / ".hidden" / "file").write_text("mine")
    (place / "file").write_text("mine")
    (place / "empty").mkdir()
    (place / "empty-inside" / "below").mkdir(parents=True)
    (place / "link").symlink_to("src")
    (place / "dangling").symlink_to("nowhere")
    make(place / "base", "base")
    monkeypatch.chdir(place / "src")
    return place


REFUSED = {
    "..": "contains the current directory",
    "../../project": "contains the current directory",
    ".": "is the current directory",
    "../src": "is the current directory",
    "/": "is a mount point",
    "../file": "is a file",
    "../file/below": "is a file, expected a directory",
    "../link": "is a link",
    "../dangling": "is a link",
    "../.hidden": "is not empty and was not made by caliport",
    "../empty-inside": "is not empty and was not made by caliport",
    "../base": "is an input",
    "../base/below": "is inside the input",
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(("out", "problem"), REFUSED.items(), ids=REFUSED)
def test_what_is_not_ours_is_refused(out: str, problem: str, force: bool, project: Path) -> None:
    before = everything(project)
    if force and "was not made" in problem:
        return
    with forced(force), pytest.raises(InputError, match=problem) as caught:
        check_output(Path(out), "base", [Path("../base"), "a-hub/name"])
    assert "\n" not in str(caught.value)
    if "input" not in problem:
        with pytest.raises(InputError, match=problem), forced(force):
            make(Path(out))
    assert everything(project) == before


def test_a_place_around_an_input_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "all" / "base")
    with pytest.raises(InputError, match="contains the input"):
        check_output(tmp_path / "all", "export", [tmp_path / "all" / "base"])


def test_new_and_empty_directories_are_fine(project: Path) -> None:
    for name in ("new", "empty", "deep/er"):
        make(project / name)
        assert (project / name / "file").read_text() == "ours"


def test_an_output_is_replaced_by_the_same_stage_alone(tmp_path: Path) -> None:
    make(tmp_path / "out")
    make(tmp_path / "out", content="again")
    assert (tmp_path / "out" / "file").read_text() == "again"
    with pytest.raises(InputError, match="was made by the stage 'export', this is 'compose'"):
        make(tmp_path / "out", "compose")
    assert (tmp_path / "out" / "file").read_text() == "again"
    with forced():
        make(tmp_path / "out", "compose", "forced")
    assert (tmp_path / "out" / "file").read_text() == "forced"


@pytest.mark.parametrize("name", ["notes.txt", ".notes", "below/notes.txt"])
def test_a_users_file_in_an_output_of_ours_is_kept(name: str, tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    with pytest.raises(InputError, match="was not made by caliport and would be lost"):
        make(out)
    assert everything(out)[name] == "mine"


def test_a_manifest_of_somebody_else_makes_nothing_ours(tmp_path: Path) -> None:
    for text in ("", "[]", '{"files": {}}', '{"stage": "export", "key": "", "files": []}'):
        (tmp_path / "theirs").mkdir(exist_ok=True)
        (tmp_path / "theirs" / "manifest.json").write_text(text)
        with pytest.raises(InputError, match="was not made by caliport"):
            make(tmp_path / "theirs")
        assert (tmp_path / "theirs" / "manifest.json").read_text() == text


def _safetensors(place: Path) -> None:
    save_file({"a": torch.zeros(10_000)}, place / "weights.safetensors")


def _torch(place: Path) -> None:
    with (place / "weights.pt").open("wb") as stream:
        torch.save({"a": torch.zeros(10_000)}, stream)


def _onnx(place: Path) -> None:
    import onnx_ir

    weights = onnx_ir.Value(name="w", const_value=onnx_ir.tensor(np.zeros(10_000, np.float32)))
    graph = onnx_ir.Graph([], [], nodes=[], initializers=[weights], opset_imports={"": 21})
    onnx_ir.save(onnx_ir.Model(graph, ir_version=10), place / "model.onnx")


def _tokenizer(place: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"word{i}": i for i in range(5000)}, "word0"))
    tokenizer.save(str(place / "tokenizer.json"))


def _plain(place: Path) -> None:
    (place / "file").write_bytes(bytes(40_000))


@pytest.mark.parametrize("write", [_safetensors, _torch, _onnx, _tokenizer, _plain])
def test_a_full_disk_is_one_line_whichever_library_writes(
    write: Callable[[Path], None], tmp_path: Path, full_disk: None
) -> None:
    with (
        pytest.raises(InputError, match="out: cannot be written: File too large; name a writable"),
        new_directory(tmp_path / "out", "export", {}, {}) as (partial, _),
    ):
        write(partial)
    assert list(tmp_path.iterdir()) == []


def test_a_problem_with_another_file_names_that(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"^/input: Permission denied$"),
        new_directory(tmp_path / "out", "export", {}, {}),
    ):
        raise PermissionError(errno.EACCES, "Permission denied", "/input")
