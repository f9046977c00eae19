"""The command line itself: fast help, and bad input that ends in one line and leaves nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT, IN_NAMESPACE, ROOT, caliport, can_mount

from caliport.core.errors import InputError
from tests.forking import forked


def one_line(done: subprocess.CompletedProcess, says: str) -> None:
    """It failed as bad input does: exit code 2 and one line that says what is wrong."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("caliport: ")
    assert says in lines[0]


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    """What makes ``--help`` fast: no library that takes longer to load than typer."""
    code = (
        "import sys, contextlib, io\n"
        "from caliport.cli.app import app\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    app(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'onnxruntime', 'pydantic', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, text=True, capture_output=True
    )
    assert found.stdout.strip() == "[]", found.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "gone.yaml"], "no such recipe"),
        (["run"], "Missing argument"),
        (["rnu"], "No such command"),
        (["export", "--runtime", "onnx", "--out", "o"], "--base is missing"),
        (["export", "--base", "./gone", "--runtime", "onnx", "--out", "o"], "no such directory"),
        (["export", "--base", "x", "--runtime", "tflite", "--out", "o"], "--runtime is 'tflite'"),
        (["validate", "gone"], "no such file or directory"),
        (["report", "."], "no reports"),
    ],
)
def test_wrong_arguments(arguments: list[str], says: str, tmp_path: Path) -> None:
    one_line(forked(*arguments, cwd=tmp_path), says)
    assert not list(tmp_path.iterdir())


def test_init_writes_a_recipe_once(tmp_path: Path) -> None:
    assert caliport("init", cwd=tmp_path).returncode == 0
    assert "compositions:" in (tmp_path / "recipe.yaml").read_text()
    one_line(forked("init", cwd=tmp_path), "already exists")


def test_recipe_with_a_typo(tmp_path: Path) -> None:
    text = (ROOT / "recipes" / "toy.yaml").read_text().replace("rank: 8", "rnak: 8")
    (tmp_path / "r.yaml").write_text(text)
    one_line(forked("run", "r.yaml", cwd=tmp_path), "lora.rnak: unknown field; did you mean rank?")
    assert not (tmp_path / "runs").exists()


def compose(base: Path, adapters: list[Path], cwd: Path) -> subprocess.CompletedProcess:
    flags = [flag for adapter in adapters for flag in ("--adapter", adapter)]
    return forked(
        "calibrate", "--base", base, *flags, "--method", "linear", "--out", "out/mine", cwd=cwd
    )


def test_truncated_adapter_leaves_nothing(
    base_dir: Path, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(adapter_dirs[0], tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    one_line(compose(base_dir, [tmp_path / "cut", adapter_dirs[1]], tmp_path), "truncated")
    assert not list(tmp_path.glob("out/*"))
    missing = compose(base_dir, [tmp_path / "gone", adapter_dirs[1]], tmp_path)
    one_line(missing, "gone: no such")
    assert not list(tmp_path.glob("out/*"))


def test_tokenizer_of_a_larger_vocabulary(base_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(base_dir, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(200)])
    tokenizer.save_pretrained(tmp_path / "base")
    done = forked("export", "--base", "base", "--runtime", "onnx", "--out", "art", cwd=tmp_path)
    one_line(done, "the base's embedding has 384 rows")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


MOUNT = "mkdir -p out && mount -t tmpfs -o size={size}k none out && {more} exec {command}"


@pytest.mark.skipif(not can_mount(), reason="needs mount namespaces to make such a disk")
@pytest.mark.parametrize(
    ("size", "more", "says"),
    [
        (40, "", "No space left on device"),
        (999, "mount -o remount,ro out &&", "out is read-only; name a writable place"),
    ],
    ids=["full", "read-only"],
)
def test_disk_that_cannot_be_written(
    size: int, more: str, says: str, base_dir: Path, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    command = f"{sys.executable} -m caliport calibrate --base {base_dir} --method linear"
    command += "".join(f" --adapter {adapter}" for adapter in adapter_dirs) + " --out out/mine"
    script = MOUNT.format(size=size, more=more, command=command)
    done = subprocess.run(
        [*IN_NAMESPACE, "sh", "-c", script + "; ls -A out"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
    )
    one_line(done, says)
    assert "out/mine: cannot be written: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export", "--base", "b", "--adapter", "A", "--adapter", "B"), "--adapter: found twice"),
        (("export", "--adapter=A", "--adapter=B"), "caliport calibrate composes several"),
        (("calibrate", "--base", "a", "--base", "b"), "--base: found twice, expected once"),
        (("baseline", "show", "--help"), None),
        (("validate", "gone", "--base", "b"), "gone: no such file or directory, expected a recipe"),
        (("report", "gone"), "gone: no such file or directory, expected a recipe or a run"),
    ],
)
def test_no_flag_vanishes(
    arguments: tuple[str, ...], said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    from caliport.cli.main import app, guarded

    code = guarded(lambda: app(list(arguments), standalone_mode=False), "", False)
    if said is None:
        assert code == 0
        return
    assert code == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_a_value_that_looks_like_a_flag_is_a_value() -> None:
    """``--prompt --base={input}`` names a prompt, not the base once more."""
    from caliport.cli.app import app

    flags = ["--base", "gone/x/y", "--prompt", "--base={input}", "--adapter", "a", "--adapter", "b"]
    with pytest.raises(InputError, match="gone"):
        app(["calibrate", *flags, "--method", "linear", "--out", "o"], standalone_mode=False)


def test_no_command_replaces_what_is_not_ours(
    base_dir: Path, adapter_dirs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before any work; ``--force`` holds for its own command alone."""
    from caliport.cli.main import app, guarded

    (tmp_path / "project").mkdir()
    mine = tmp_path / "project" / "main.py"
    mine.write_text("mine")
    data = tmp_path / "data.jsonl"
    data.write_text('{"input": "a", "output": "b", "features": ["de"]}\n')
    adapters = ["--adapter", adapter_dirs[0], "--adapter", adapter_dirs[1]]
    merge = ["calibrate", "--base", base_dir, *adapters, "--method", "linear"]
    flix = ["--method", "flix", "--data", data, "--rank", "de=2", "--steps", 1]
    commands: list[list[object]] = [
        ["export", "--base", base_dir, "--runtime", "onnx"],
        merge,
        ["calibrate", "--base", base_dir, *flix],
    ]

    def run(*arguments: object) -> int:
        call = [str(argument) for argument in arguments]
        return guarded(lambda: app(call, standalone_mode=False), "", False)

    for command in commands:
        for out in (mine.parent, base_dir, base_dir.parent, mine):
            assert run(*command, "--out", out) == 2
            assert capsys.readouterr().err.count("\n") == 1
        assert run(*command, "--out", base_dir, "--force") == 2
        assert "is an input" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert run(*merge, "--out", mine.parent, "--force") == 0
    assert not mine.exists()
    mine.write_text("again")
    assert run(*merge, "--weight", 1, "--weight", 0, "--out", mine.parent) == 2
    assert mine.read_text() == "again"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--weight", "1e38"], "--weight"),
        (["--weight", "nan"], "--weight"),
        (["--learning-rate", "inf"], "--learning-rate"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--steps", "1" + "0" * 30], "--steps"),
        (["--seed", "1" + "0" * 30], "--seed"),
        (["--base", "y" * 100_000], "--base"),
        (["--out", "y" * 100_000], "yyy"),
    ],
)
def test_values_out_of_range(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from caliport.cli.main import app, guarded

    assert guarded(lambda: app(["calibrate", *flags], standalone_mode=False), "", False) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert len(error) < 2100
