"""A file of the user's is never replaced, and odd places are refused before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from caliport.core.errors import InputError
from caliport.core.outputs import check_output, forced, new_directory
from caliport.core.places import check_file, replacing, write_text

ODD = {
    "": "is a directory",
    ".": "is a directory",
    "directory": "is a directory",
    "pipe": "is not a regular file",
    "/dev/null": "is not a regular file",
    "link": "is a link",
    "dangling": "is a link",
    "loop/x": "loop",
    "mine.json": "was not made by caliport and would be lost",
    "mine.json/x": "is a file, expected a directory",
    "a\nb": "a b: has a control character",
    "a\x1b[31mb": "has a control character",
    "\udc80": "",
    "n" * 300: "is too long",
    "n/" * 3000: "is too long",
    "n" * 100_000: "is too long",
    "/proc/x": "",
}


@pytest.mark.parametrize(("name", "problem"), ODD.items(), ids=[repr(n)[:20] for n in ODD])
def test_odd_places_are_refused(
    name: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    (tmp_path / "link").symlink_to("mine.json")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for write in (check_file, lambda path: write_text(path, "new")):
        if not problem:  # a name that the file system takes or refuses itself
            continue
        with pytest.raises(InputError, match=problem) as caught:
            write(Path(name))
        message = str(caught.value)
        assert message.isprintable()
        assert len(message) < 1000
    if problem and name not in ("directory", "mine.json"):
        with pytest.raises(InputError):
            check_output(Path(name), "export")
    assert (tmp_path / "mine.json").read_text() == '{"mine": 1}'


def make(out: Path) -> None:
    with new_directory(out, "export", {}, {}):
        pass


def test_a_directory_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *given, **more: False)  # as of a read-only disk
    for check in (check_file, make):
        with pytest.raises(InputError, match="is read-only; name a writable place"):
            check(tmp_path / "new" / "out")


OURS = {
    "empty": "",
    "report": '{\n "machine": {\n  "cpu": "x"',
    "quality": '{\n "name": "a \\"name\\", odd",\n "machine": {\n  "cpu": "x"',
    "baseline": '{\n "format": 1,\n "machine": {\n  "cpu": "x"',
    "page": '<!DOCTYPE html>\n<meta name="generator" content="caliport">',
    "junit": "<?xml version='1.0' encoding='utf-8'?>\n<testsuites name=\"caliport\">",
    "summary": "## ✕ 1 of 2 artifacts failed\n\nwhy\n\nA CPU, 2 cores, Linux; x 1",
}
THEIRS = (
    '{"format": 1}',
    '[{"machine": {"cpu": 1}}]',
    '{"a": {"machine": {"cpu": ""}}}',
    "<testsuites>",
    "## Notes\n\ncaliport",
    "\x00\xff",
)


@pytest.mark.parametrize("text", OURS.values(), ids=OURS)
def test_what_caliport_wrote_is_replaced(text: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text(text)
    write_text(tmp_path / "out", "new")
    assert (tmp_path / "out").read_text() == "new"


@pytest.mark.parametrize("text", THEIRS, ids=range(len(THEIRS)))
def test_what_others_wrote_is_kept(text: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text(text)
    with pytest.raises(InputError, match="was not made by caliport"):
        write_text(tmp_path / "out", "new")
    assert (tmp_path / "out").read_text() == text
    with forced():
        write_text(tmp_path / "out", "new")
    assert (tmp_path / "out").read_text() == "new"


def test_no_temporary_file_is_the_users(tmp_path: Path) -> None:
    """``b.new`` beside ``b.json`` is kept, and a link of that name is not followed."""
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "b.new").symlink_to("victim")
    (tmp_path / "b.json.new").write_text("mine")
    write_text(tmp_path / "b.json", "new")
    assert (tmp_path / "victim").read_text() == (tmp_path / "b.json.new").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "b.json",
        "b.json.new",
        "b.new",
        "victim",
    ]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(out) as beside:
        beside.write_text("half \ud800", encoding="utf-8")
    with pytest.raises(InputError, match="surrogate"):
        write_text(tmp_path / "other", "\ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert out.read_text() == "old"


def test_new_files_have_the_usual_mode(tmp_path: Path) -> None:
    write_text(tmp_path / "new", "x")
    (tmp_path / "usual").write_text("x")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode
