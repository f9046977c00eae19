"""A task's prompt travels: composed adapter, artifact, card, and what asks the artifact."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import caliport
from caliport.core.directories import read_manifest
from caliport.core.errors import InputError
from caliport.core.prompts import check_prompt, prompted, recorded_prompt
from caliport.export.artifact import Artifact
from caliport.export.request import Bundle
from caliport.stages.sources import Source
from tests.exports import to_onnx, to_onnx_bundle

PROMPT = "Say | it `twice`:\n\x1b[31m{input}\n```"
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """A command in this process: its exit code and what it wrote on stderr."""
    from caliport.cli.main import app, guarded

    def run(*words: object) -> tuple[int, str]:
        code = guarded(lambda: app([*map(str, words)], standalone_mode=False), "", False)
        return code, capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def made(
    base_dir: Path, adapter_dirs: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A merge with a prompt, and a fold and a bundle of it."""
    root = tmp_path_factory.mktemp("made")
    (root / "data.jsonl").write_text('{"input": "a", "output": "b"}\n')
    data = Source(root / "data.jsonl", PROMPT)
    composed = caliport.compose(base_dir, adapter_dirs, root / "both", method="linear", data=data)
    to_onnx(base_dir, root / "fold", adapter=composed)
    to_onnx_bundle(base_dir, {"said": composed, "task": adapter_dirs[0]}, root / "bundle")
    return root


def test_the_prompt_is_in_every_manifest_and_card(made: Path) -> None:
    assert recorded_prompt(made / "both") == PROMPT
    fold, bundle = Artifact.read(made / "fold"), Artifact.read(made / "bundle")
    assert (fold.prompt(), bundle.prompt("said"), bundle.prompt("task")) == (PROMPT, PROMPT, None)
    assert bundle.prompt() is None, "the base alone has no task"
    for directory in (fold.directory, bundle.directory):
        card = (directory / "README.md").read_text()
        assert "    Say | it `twice`:\n    \\x1b[31m{input}\n    ```\n" in card
        code = re.search(r"```python\n(.*?)\n```\n", card, re.DOTALL)
        assert code is not None
        compile(code[1], "card", "exec")
        assert json.dumps(PROMPT.replace("{input}", "Hello")) in code[1]


def test_a_new_prompt_is_a_new_artifact(made: Path, base_dir: Path, tmp_path: Path) -> None:
    """Manifests are no part of a directory's hash, so the request names the prompt."""
    from caliport.export.quantization.choices import Quantization
    from caliport.export.request import Request

    def asked(adapter: Path) -> dict:
        how = Quantization("fp32")
        return Request(base_dir, "onnx", how, bundle=Bundle({"said": adapter})).settings()

    assert asked(made / "both")["prompts"] == {"said": PROMPT}
    assert "prompts" not in asked(tmp_path)


def test_validation_asks_with_the_recorded_prompt(
    made: Path, base_dir: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """``--prompt`` wins, a text that has its prompt keeps it, and a long one is named by line."""
    from caliport.validation import api

    asked: list[list[str]] = []

    def stop(asks: object, inputs: list[str], *more: object) -> None:
        asked.append(api_asked(asks, inputs, *more))
        raise InputError("stop")

    api_asked = api._asked
    prompts = tmp_path / "prompts.jsonl"
    whole = PROMPT.replace("{input}", "b")
    rows = [{"input": text, "output": "c"} for text in ("a", whole)]
    prompts.write_text("\n\n".join(map(json.dumps, rows)))
    fold = ("validate", made / "fold", "--adapter", made / "both")
    bundle = ("validate", made / "bundle", "--bundle", f"said={made / 'both'}")
    more = ("--base", base_dir, "--prompts", prompts, "--no-latency")
    with monkeypatch.context() as patch:
        patch.setattr(api, "_asked", stop)
        assert command(*fold, *more)[0] == 2
        assert command(*fold, *more, "--prompt", "x{input}")[0] == 2
        assert command(*bundle, *more)[0] == 2
    said = [PROMPT.replace("{input}", "a"), whole]
    assert asked == [said, ["xa", f"x{whole}"], ["a", whole]]
    assert api._asked(_validation(made / "bundle"), ["a"], made / "both", "said") == said[:1]
    assert api._asked(_validation(made / "bundle"), ["a"], made / "both", "task") == said[:1], (
        "what the artifact does not record, the adapter may"
    )
    rows[1]["input"] = "word " * 200
    prompts.write_text("\n\n".join(map(json.dumps, rows)))
    code, said_now = command(*fold, *more)
    assert code == 2
    assert re.search(r"prompts\.jsonl, line 3: a prompt of \d+ tokens leaves no room", said_now)


def _validation(artifact: Path) -> object:
    from caliport.validation.api import Validation

    return Validation(Artifact.read(artifact), "base")


def test_generate_asks_with_the_recorded_prompt(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from caliport.core import checkpoints

    asked: list[str] = []
    monkeypatch.setattr(checkpoints, "encode_prompt", lambda _, text: asked.append(text) or [5])
    caliport.generate(made / "fold", "a", max_new_tokens=1)
    caliport.generate(made / "fold", "a", max_new_tokens=1, prompt="{input}")
    caliport.generate(made / "bundle", "a", max_new_tokens=1, composition="task")
    assert asked == [PROMPT.replace("{input}", "a"), "a", "a"]


@pytest.mark.parametrize(
    "words",
    [
        ("calibrate", "--base", "b", "--adapter", "a", "--out", "o"),
        ("validate", "tests", "--base", "b"),
        ("device", "validate", "tests", "--base", "b"),
        ("sensitivity", "--base", "b"),
    ],
    ids=" ".join,
)
def test_a_prompt_has_its_input(words: tuple[str, ...], command: Command) -> None:
    for prompt in ("constant", "", "{input" * 10_000, "\udc80{input}"):
        code, said = command(*words, "--prompt", prompt)
        assert (code, said.count("\n")) == (2, 1), said
        assert "--prompt" in said
        assert len(said) < 500


def test_a_prompt_alone_asks_nobody(base_dir: Path, made: Path, command: Command) -> None:
    code, said = command("validate", made / "fold", "--base", base_dir, "--prompt", "x {input}")
    assert (code, said.count("--prompt goes with --prompts FILE")) == (2, 1)


@pytest.mark.parametrize("prompt", [1, ["{input}"], "no place", "{input}" + "x" * 20_000])
def test_a_recorded_prompt_that_is_none_is_refused(prompt: object, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"prompt": prompt}))
    with pytest.raises(InputError, match=r"manifest\.json: prompt"):
        recorded_prompt(tmp_path)
    artifact = Artifact(tmp_path, "onnx", "fp32", {"adapter": {"prompt": prompt}})
    with pytest.raises(InputError, match=r"manifest\.json: prompt"):
        artifact.prompt()


def test_manifests_without_a_prompt(tmp_path: Path) -> None:
    for manifest in ({}, {"adapter": None}, {"adapter": {"ranks": [4]}}):
        assert Artifact(tmp_path, "onnx", "fp32", manifest).prompt() is None
    (tmp_path / "manifest.json").write_text("{}")
    assert recorded_prompt(tmp_path) is None
    assert read_manifest(tmp_path) == {}


def test_texts_in_their_prompts() -> None:
    assert prompted(["a", "{input}"], None, None) == ["a", "{input}"]
    assert prompted(["a", "Say: a"], None, "Say: {input}") == ["Say: a", "Say: a"]
    assert prompted(["Say: a"], "Say: {input}", "No: {input}") == ["Say: Say: a"]
    assert prompted([" a"], None, " {input}") == ["  a"], "spaces alone are no words"
    with pytest.raises(InputError, match=r"has no \{input\}"):
        prompted(["a"], "none", None)
    assert check_prompt("{input}", "x") == "{input}"
