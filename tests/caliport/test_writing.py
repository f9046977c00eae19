"""No command that writes replaces what caliport did not make; each says so before any work."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import pytest

from caliport.cli.main import app, guarded
from tests.commands import ROOT
from tests.validation import runs

TOY = ROOT / "recipes" / "toy.yaml"
Said = Callable[..., str]

REPORTS: dict[str, list[object]] = {
    "audit": ["audit", "gone/a", "gone/b", "--out"],
    "bench": ["bench", "gone", "--out"],
    "device validate": ["device", "validate", "gone", "--base", "gone", "--out"],
}
"""Commands that write reports into the directory that is named last; inputs are looked at later."""
FILES: dict[str, list[object]] = {
    "compare": ["compare", "run", "run", "--out"],
    "baseline store": ["baseline", "store", "run"],
    "init": ["init"],
    "sensitivity": ["sensitivity", "--base", "gone", "--out"],
}
"""Commands that write the file that is named last."""
DIRECTORIES: dict[str, list[object]] = {
    "export": ["export", "--base", "base", "--runtime", "onnx", "--out"],
    "merge": [
        *("calibrate", "--base", "base", "--adapter", "a", "--adapter", "b"),
        *("--method", "linear", "--out"),
    ],
    "flix": [
        *("calibrate", "--base", "base", "--method", "flix", "--data", "run", "--rank", "de=2"),
        "--out",
    ],
    "runner": ["runner", "build", "--target", "host", "--out"],
}
"""Commands that make the directory that is named last."""
RUNS: dict[str, list[object]] = {
    name: [name, TOY, "--runs", "runs"] for name in ("run", "calibrate", "export", "validate")
}
"""Commands that write a run's directory."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with files of the user's, a run of ours, and links to the user's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine").mkdir()
    for name in ("notes", "report.html", "junit.xml", "latency.json", "parity.json", "b.new"):
        (tmp_path / "mine" / name).write_text("mine")
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    (tmp_path / "link.json").symlink_to("mine.json")
    runs.write_run(tmp_path / "run", *runs.run_of())
    return tmp_path


@pytest.fixture
def refused(here: Path, capfd: pytest.CaptureFixture[str]) -> Said:
    """Run a command that must end in one line and change nothing; the line."""

    def run(*arguments: object) -> str:
        before = everything(here)
        call = [str(argument) for argument in arguments]
        code = guarded(lambda: app(call, standalone_mode=False), "caliport --help", False)
        out, said = capfd.readouterr()
        assert code == 2, said + out
        assert said.count("\n") == 1
        assert said.startswith("caliport: ")
        assert said.strip().isprintable()
        assert len(said) < 1000
        assert everything(here) == before
        return said

    return run


def everything(place: Path) -> dict[str, str]:
    found = sorted(place.rglob("*"))
    return {
        path.relative_to(place).as_posix(): path.read_text() if path.is_file() else ""
        for path in found
    }


@pytest.mark.parametrize("command", REPORTS.values(), ids=REPORTS)
def test_reports(command: list[object], refused: Said) -> None:
    assert "was not made by caliport and would be lost" in refused(*command, "mine")
    assert "mine.json is a file, expected a directory" in refused(*command, "mine.json")
    assert "mine.json is a file, expected a directory" in refused(*command, "mine.json/below")
    for odd in ("", "a\nb", "n" * 300, "/dev/null"):
        refused(*command, odd)


@pytest.mark.parametrize("command", FILES.values(), ids=FILES)
def test_files(command: list[object], refused: Said) -> None:
    for odd in ("mine.json", "link.json", "mine.json/x.json", "/dev/null/x.json", "", "a\nb.json"):
        refused(*command, odd)
    refused(*command, "n" * 300 + ".json")


@pytest.mark.parametrize("command", DIRECTORIES.values(), ids=DIRECTORIES)
def test_directories(command: list[object], refused: Said) -> None:
    for odd in ("mine", "mine.json", "link.json", ".", "..", "/proc", "", "a\nb", "n" * 300):
        refused(*command, odd)
    refused(*command, "mine.json/below")


@pytest.mark.parametrize("face", ["export", "compose", "validate", "optimum"])
def test_other_faces(face: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Python's functions and the plugin for Optimum; reports may lie beside other files."""
    import caliport
    from caliport.cli.optimum import CaliportExportCommand
    from caliport.core.errors import InputError

    def call(out: str) -> None:
        if face == "export":
            caliport.export("base", out, runtime="onnx")
        elif face == "compose":
            caliport.compose("base", ["a", "b"], out, method="linear")
        elif face == "validate":
            caliport.validate("gone", "base", out=out)
        else:
            parser = ArgumentParser()
            CaliportExportCommand.parse_args(parser)
            given = parser.parse_args(["-m", "base", "--runtime", "onnx", out])
            command = CaliportExportCommand.__new__(CaliportExportCommand)
            command.args = given
            with pytest.raises(SystemExit) as end:
                command.run()
            assert end.value.code == 2
            raise InputError(capfd.readouterr().err.strip())

    before = everything(here)
    odd = ["mine", "mine.json", "link.json", "mine.json/below", "n" * 300, "a\nb"]
    if face != "validate":
        odd += ["base", "base/below", ".", "..", "/proc", *(["a"] if face == "compose" else [])]
    for out in odd:
        with pytest.raises(InputError) as caught:
            call(out)
        assert str(caught.value).isprintable(), out
        assert "no such directory" not in str(caught.value)
        assert everything(here) == before, out


def test_python_replaces_what_is_not_ours_only_if_told(here: Path) -> None:
    """And then no input, either."""
    import caliport
    from caliport.core.errors import InputError

    with pytest.raises(InputError, match="is an input"):
        caliport.export("base", "base", runtime="onnx", force=True)
    with pytest.raises(InputError, match="is an input"):
        caliport.compose("base", ["a", "b"], "a", method="linear", force=True)
    with pytest.raises(InputError, match=r"no config\.json"):  # the next thing that is looked at
        caliport.export("base", "mine", runtime="onnx", force=True)


@pytest.mark.parametrize("command", RUNS.values(), ids=RUNS)
def test_runs(command: list[object], refused: Said, here: Path) -> None:
    place = here / "runs" / "toy" / "reports"
    place.mkdir(parents=True)
    (place / "report.html").write_text("mine")
    assert "was not made by caliport" in refused(*command)


def test_a_report_of_a_run(refused: Said, here: Path) -> None:
    (here / "run" / "reports" / "report.html").write_text("mine")
    assert "was not made by caliport" in refused("report", "run")


def test_the_runners_cache(refused: Said, here: Path) -> None:
    (here / "host").mkdir()
    (here / "host" / "Makefile").write_text("mine")
    said = refused("runner", "build", "--target", "host", "--out", "new", "--cache", ".")
    assert "host: was not made by caliport; name another --cache" in said


def test_a_cache_of_texts_is_not_appended_to_notes(here: Path) -> None:
    from caliport.core.errors import InputError
    from caliport.data.rewriting import _opened

    with (
        pytest.raises(InputError, match="not a cache of rewritten texts"),
        _opened(here / "mine" / "notes"),
    ):
        pass
    assert (here / "mine" / "notes").read_text() == "mine"


def test_what_caliport_wrote_is_written_again(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for call in (
        ["compare", "run", "run"],
        ["baseline", "store", "run", "base.json"],
        ["report", "run"],
    ):
        for _ in range(2):
            assert guarded(lambda: app(call, standalone_mode=False), "", False) == 0  # noqa: B023
    assert not [name for name in everything(here) if name.endswith(".new") and name != "mine/b.new"]


NAMES = ("../../pwn", "/etc/x", "", ".", "..", "a.b", "a/b", "a\nb", "a\x1b[0m", "n" * 10**6, "-a")


@pytest.mark.parametrize("name", NAMES, ids=[repr(name)[:20] for name in NAMES])
def test_names_of_features_that_are_no_names(name: str, refused: Said) -> None:
    """Of flags, and of the settings that Python gives."""
    from caliport.calibrate.training.flix import FeatureSettings
    from caliport.core.errors import InputError

    flix = ("calibrate", "--base", "base", "--method", "flix", "--data", "run", "--out", "new")
    said = refused(*flix, f"--rank={name}=2")
    expected = "at most 10,000 characters" if len(name) > 10_000 else "a name of letters, digits, -"
    assert f"expected {expected}" in said
    with pytest.raises(InputError, match="expected a name of letters"):
        FeatureSettings({name: 2})


@pytest.mark.parametrize("rank", ["0", "-1", "1e3", "9" * 5000, "99999999", "", "nan"])
def test_ranks_that_are_none(rank: str, refused: Said) -> None:
    flix = ("calibrate", "--base", "base", "--method", "flix", "--data", "run", "--out", "new")
    refused(*flix, f"--rank=de={rank}")
