"""What lands in site-packages: one package, beside anything else of any name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from commands import ROOT

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"COLUMNS": "200"}
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
STAGES = ("android_harness", "calibrate", "caliport_core", "export", "recipes", "validation")
BUILD = (
    "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
)


def _run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=ENVIRONMENT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree without git, as a source distribution is built from."""
    place = tmp_path_factory.mktemp("source") / "tree"
    for name in ("caliport", "optimum", *STAGES):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, place / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    return place


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    _run(sys.executable, "-c", BUILD, "build_wheel", "wheels", cwd=source)
    (found,) = (source / "wheels").glob("*.whl")
    return found


def _names(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_nothing_generic_is_installed(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in _names(wheel)}
    assert tops == {"caliport", "optimum"}
    assert [n for n in _names(wheel) if n.startswith("optimum/")] == [
        "optimum/commands/register/register_caliport.py"
    ]


def test_the_wheel_holds_every_module_recipe_and_template(wheel: Path) -> None:
    kinds = {".py", ".yaml", ".j2", ".cpp", ".hpp", ".txt"}
    folders = {"caliport_core": "core", **{name: name for name in STAGES if name[0] != "c"}}
    folders["calibrate"] = "calibrate"
    expected = {"caliport/py.typed"}
    for folder, name in {**folders, "caliport": ""}.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in kinds and path.is_file():
                inside = path.relative_to(ROOT / folder).as_posix()
                expected.add("/".join(filter(None, ("caliport", name, inside))))
    assert expected <= _names(wheel)


def test_a_source_distribution_builds_the_same_wheel(
    source: Path, wheel: Path, tmp_path: Path
) -> None:
    _run(sys.executable, "-c", BUILD, "build_sdist", tmp_path, cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (place,) = (tmp_path / "unpacked").iterdir()
    _run(sys.executable, "-c", BUILD, "build_wheel", "wheels", cwd=place)
    (again,) = (place / "wheels").glob("*.whl")
    assert _names(again) == _names(wheel)


def test_it_works_beside_a_package_named_validation(wheel: Path, tmp_path: Path) -> None:
    """In an environment that shares only the libraries with this one."""
    venv.create(tmp_path / "venv", symlinks=True)
    packages = next((tmp_path / "venv/lib").glob("python*")) / "site-packages"
    shared = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "shared.pth").write_text("\n".join(shared))  # not read as one: no .pth of theirs
    (packages / "validation").mkdir()
    (packages / "validation/__init__.py").write_text("WHOSE = 'theirs'\n")
    python = tmp_path / "venv/bin/python"
    install = [*PIP, "--python", python, "install", "--ignore-installed", "--no-deps", "--no-index"]
    _run(*install, wheel, cwd=tmp_path)
    said = _run(tmp_path / "venv/bin/caliport", "doctor", cwd=tmp_path)
    assert "everything would work" in said
    assert "ONNX Runtime's usage events: off" in said
    told = "import caliport, validation; print(caliport.__file__, validation.WHOSE)"
    where, whose = _run(python, "-c", told, cwd=tmp_path).split()
    assert Path(where).is_relative_to(packages)
    assert whose == "theirs"
    _run(python, "-m", "caliport", "init", "toy.yaml", "--recipe", "toy", cwd=tmp_path)
    assert (tmp_path / "toy.yaml").read_bytes() == (ROOT / "recipes/toy.yaml").read_bytes()
    command = [python, "-m", "optimum.commands.optimum_cli", "export", "caliport", "--help"]
    assert "--runtime" in _run(*command, cwd=tmp_path)
