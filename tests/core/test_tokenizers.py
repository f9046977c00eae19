"""Tokenizers of strangers: files checked first, native failures named, ends that agree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer

from caliport.core.checkpoints import eos_ids, load_base, load_tokenizer
from caliport.core.errors import InputError
from caliport.core.model_files.answers import end_trouble
from caliport.core.model_files.tokenizers import no_panic, open_tokenizer
from caliport.export.api import export
from caliport.export.package.tokenizer import read_tokenizer
from caliport.stages.sources import Source
from tests.commands import ENVIRONMENT

Change = Callable[[Path], Any]


@pytest.fixture
def base(base_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base_dir, tmp_path / "base")


def edit(name: str, **changes: Any) -> Change:
    """Changes of a JSON file, made if it is not there."""

    def change(base: Path) -> None:
        path = base / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | changes))

    return change


def write(name: str, text: str | bytes) -> Change:
    def change(base: Path) -> None:
        path = base / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def link(name: str, target: str) -> Change:
    def change(base: Path) -> None:
        path = base / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return change


def vocabulary(**changes: Any) -> Change:
    """Changes of the model in ``tokenizer.json``."""

    def change(base: Path) -> None:
        path = base / "tokenizer.json"
        found = json.loads(path.read_text())
        found["model"] |= changes
        path.write_text(json.dumps(found))

    return change


CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
BAD: dict[str, tuple[Change, str]] = {
    "a device": (link(TOKENIZER, "/dev/zero"), "tokenizer.json: not a regular file"),
    "a pipe": (
        lambda b: ((b / "vocab.json").unlink(missing_ok=True), os.mkfifo(b / "vocab.json")),
        "vocab.json: not a regular file",
    ),
    "outside": (link("chat_template.jinja", "/etc/hostname"), "is outside"),
    "outside, one of many": (link("chat_templates/x.jinja", "/etc/hostname"), "is outside"),
    "outside, by two links": (link("tokenizer.model", "../../../etc/hostname"), "tokenizer.model"),
    "nothing there": (link("special_tokens_map.json", "gone"), "special_tokens_map.json: not read"),
    "no object": (write("special_tokens_map.json", "[]"), "expected a JSON object"),
    "deep": (write("added_tokens.json", "[" * 10_000), "nested too deep"),
    "no text": (write("chat_template.jinja", b"\xff"), "byte 0 is not UTF-8"),
    "a long template": (write("chat_template.jinja", "a" * 2_000_000), "expected at most 1,048"),
    "another file": (
        edit(CONFIG, fast_tokenizer_files=["tokenizer.4.0.0.json", "tokenizer.1/../../x.json"]),
        "fast_tokenizer_files is",
    ),
    "no JSON": (write(TOKENIZER, "{"), "tokenizer.json: not usable as a tokenizer (Exception"),
    "deep native": (write(TOKENIZER, "[" * 100_000), "tokenizer.json: not usable as a tokenizer"),
    "no vocabulary": (vocabulary(vocab=7), "tokenizer.json: not usable as a tokenizer"),
    "a merge of nothing": (vocabulary(merges=[["no", "where"]]), "not usable as a tokenizer"),
    "a panic": (
        edit(
            TOKENIZER,
            normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
        ),
        "not usable as a tokenizer",
    ),
    "no pattern": (
        edit(TOKENIZER, pre_tokenizer={"type": "FixedLength", "length": 0}),
        "not usable as a tokenizer",
    ),
    "a wrong class": (edit(CONFIG, added_tokens_decoder={"x": 1}), "not loadable as a tokenizer"),
    "a wrong token": (edit(CONFIG, eos_token=[1]), "not loadable as a tokenizer"),
    "templates": (
        lambda b: (
            (b / "chat_template.jinja").unlink(),
            edit(CONFIG, chat_template=[{"name": "default"}])(b),
        ),
        "not loadable as a tokenizer",
    ),
}


@pytest.mark.parametrize(("change", "expected"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("read", [load_tokenizer, read_tokenizer])
def test_a_hostile_tokenizer_ends_in_one_line(
    base: Path, change: Change, expected: str, read: Callable[[Path], Any]
) -> None:
    change(base)
    with pytest.raises(InputError) as caught:
        read(base)
    assert expected in str(caught.value)
    assert str(base) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_in_a_hub_cache_is_read(base: Path, tmp_path: Path) -> None:
    home, blobs = tmp_path / "hub" / "snapshots" / "0123", tmp_path / "hub" / "blobs"
    home.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(base.iterdir())):
        shutil.copy(file, blobs / str(number))
        (home / file.name).symlink_to(f"../../blobs/{number}")
    assert open_tokenizer(home).get_vocab() == open_tokenizer(base).get_vocab()


def test_a_base_with_a_sentencepiece_model_alone(base: Path, tmp_path: Path) -> None:
    """Its artifact has a ``tokenizer.json`` that gives the same tokens."""
    for file in (*base.glob("tokenizer*"), base / "chat_template.jinja"):
        file.unlink(missing_ok=True)
    text = tmp_path / "text"
    text.write_text("\n".join(f"the park and number {i} in summer {7 * i}" for i in range(300)))
    SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "pieces"),
        vocab_size=340,
        byte_fallback=True,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    shutil.copy(tmp_path / "pieces.model", base / "tokenizer.model")
    words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (base / CONFIG).write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **words}))
    out = export(base, tmp_path / "out", runtime="onnx", context=96).directory
    sentence = "In summer the park, Ünï 😀 42"
    tokens = load_tokenizer(base).encode(sentence)
    assert read_tokenizer(out).encode(sentence) == tokens
    assert len(tokens) > 5


def test_a_panic_is_one_line() -> None:
    class PanicException(BaseException):
        pass

    with (
        pytest.raises(InputError, match=r"here: the tokenizers library panics \(gone\)"),
        no_panic("here"),
    ):
        raise PanicException("gone")
    for kind in (KeyboardInterrupt, SystemExit, ValueError):
        with pytest.raises(kind), no_panic("here"):
            raise kind


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (edit(CONFIG, eos_token=None), None),  # the chat template's end is enough
        (
            edit("generation_config.json", eos_token_id=0),
            r"eos_token is 2 \('<\|end\|>'\), .* but the model stops at 0; add 2 to eos_token_id",
        ),
        (edit(CONFIG, eos_token="<|pad|>"), None),
        (edit("generation_config.json", eos_token_id=[0, 2]), None),
    ],
)
def test_training_ends_answers_where_the_model_ends(
    base: Path, tmp_path: Path, change: Change, expected: str | None
) -> None:
    change(base)
    (tmp_path / "data.jsonl").write_text('{"input": "a", "output": "b"}')
    source = Source(tmp_path / "data.jsonl", "{input}")
    model, tokenizer = load_base(base), load_tokenizer(base)
    if expected is None:
        assert source.encoded(tokenizer, model)[0].target[-1] == 2  # <|end|>
        assert end_trouble(tokenizer, eos_ids(model)) is None
    else:
        with pytest.raises(InputError, match=expected):
            source.encoded(tokenizer, model)


def test_export_tells_of_ends_that_differ(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.exports import to_onnx

    edit("generation_config.json", eos_token_id=0)(base)
    to_onnx(base, tmp_path / "out")
    assert "but the model stops at 0; add 2 to eos_token_id" in capsys.readouterr().err


def test_a_process_with_less_memory_tries_tokenizers_too(base_dir: Path) -> None:
    """Limits below the trial's own cannot be raised."""
    code = f"""
import resource
from pathlib import Path
from caliport.core.model_files.tokenizers import try_tokenizer
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
try_tokenizer(Path({str(base_dir)!r}) / "tokenizer.json")
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, env=ENVIRONMENT)
