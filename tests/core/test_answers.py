"""What ends an answer, which day it is and whether to think: all as the base's template has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from caliport.calibrate.training.batches import encode
from caliport.core.checkpoints import render_prompt
from caliport.core.model_files.answers import answer_end, end_trouble
from caliport.core.model_files.chat_templates import render_chat, template_pins
from caliport.stages.stage import stage
from caliport.validation.evaluation.quality import target_tokens

TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}END\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GEMMA = TURNS.replace("END", "<|user|>")  # a special token that is not eos_token
PHI = GEMMA + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
LLAMA = TURNS.replace("END", "{{ eos_token }}")
ASKS_ONLY = "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}x"


@pytest.fixture(scope="module")
def tokenizer(base_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base_dir)


@pytest.mark.parametrize(
    ("template", "ends", "expected"),
    [
        (GEMMA, ["eos", "turn"], "turn"),
        (PHI, ["eos", "turn"], "turn"),
        (GEMMA, ["eos"], "eos"),  # with which the model would not stop
        (LLAMA, ["turn", "eos"], "eos"),
        (TURNS, ["eos", "turn"], "eos"),
        (ASKS_ONLY, ["eos", "turn"], "eos"),
        (None, ["eos", "turn"], "eos"),
        (GEMMA, [], "eos"),
    ],
)
def test_answers_end_as_the_template_ends_them(
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    template: str | None,
    ends: list[str],
    expected: str,
) -> None:
    turn = tokenizer.convert_tokens_to_ids("<|user|>")
    ids = {"eos": tokenizer.eos_token_id, "turn": turn}
    assert len(set(ids.values())) == 2
    assert turn != tokenizer.unk_token_id
    monkeypatch.setattr(tokenizer, "chat_template", template)
    end = answer_end(tokenizer, [ids[e] for e in ends])
    assert end == ids[expected]
    assert (end_trouble(tokenizer, [ids[e] for e in ends]) is None) == bool(ends)
    (one,) = encode(tokenizer, "{input}", [("a", "b")], 64, "x", end=end)
    assert one.target[-1] == ids[expected]
    assert target_tokens(tokenizer, "b", end) == list(one.target)


def test_without_an_end_no_token_is_none(base_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    tokenizer.eos_token = None
    assert answer_end(tokenizer, []) is None
    assert None not in target_tokens(tokenizer, "b", None)
    assert "no eos_token" in str(end_trouble(tokenizer, []))


def test_the_day_is_always_the_same_and_nobody_thinks(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{{ strftime_now('%d %b %Y') }}"
        "{% if enable_thinking is defined and enable_thinking is false %} quiet{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert render_prompt(tokenizer, "Hi") == "26 Jul 2024 quiet"
    assert render_chat(tokenizer, [{"role": "user", "content": "Hi"}]) == "26 Jul 2024 quiet"


@pytest.mark.parametrize(
    ("template", "ends", "pins"),
    [
        (TURNS, 2, {}),
        ("{{ strftime_now('%Y') }}", 2, {"today": "2024-07-26"}),
        ("{% if enable_thinking %}x{% endif %}", 2, {"enable_thinking": "false"}),
        (TURNS + "assistant", [2, 3], {"answers_end": "as the chat template ends them"}),
    ],
)
def test_what_is_pinned_is_in_the_key_and_the_manifest(
    template: str, ends: object, pins: dict[str, str], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "chat_template.jinja").write_text(template)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (base / "config.json").write_text("{}")
    assert template_pins(base) == pins


def test_a_stage_records_what_is_pinned(base_dir: Path, tmp_path: Path) -> None:
    import shutil

    base = shutil.copytree(base_dir, tmp_path / "base")
    for name, text in (("plain", None), ("dated", "{{ strftime_now('%Y') }}")):
        if text is not None:
            (base / "chat_template.jinja").write_text(text)
        stage(tmp_path / name, "x", name, {"base": base}, {"a": 1}, lambda *_: None)
    found = [json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("plain", "dated")]
    assert [one["settings"] for one in found] == [
        {"a": 1},
        {"a": 1, "chat": {"today": "2024-07-26"}},
    ]
