"""Rewriting by real models: a tiny Marian and a tiny Llama with random weights."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MarianConfig,
    MarianMTModel,
)

from caliport.core.errors import InputError
from caliport.data import rewriting
from caliport.data.rewriting import Rewriter, tone_changer, translator

TEXTS = ["Anna meets Tom.", "The train is late, so we wait at the station.", "I like tea!"]


@pytest.fixture(scope="module")
def marian_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of OpusMT's files, with the tokens of two target languages."""
    root = tmp_path_factory.mktemp("marian")
    text = root / "text"
    text.write_text("".join(f"{line}\n" for line in TEXTS * 40))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(root / "source"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (root / "source.model").rename(root / "source.spm")
    shutil.copy(root / "source.spm", root / "target.spm")
    pieces = [line.split("\t")[0] for line in (root / "source.vocab").read_text().splitlines()]
    words = ["</s>", "<unk>", *[p for p in pieces if p not in ("<s>", "</s>", "<unk>")]]
    words += [">>es<<", ">>fra<<", "<pad>"]
    (root / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    settings = {"source_lang": "eng", "target_lang": "mul", "tokenizer_class": "MarianTokenizer"}
    (root / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = MarianConfig(
        vocab_size=len(words),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        init_std=0.5,
        pad_token_id=len(words) - 1,
        decoder_start_token_id=len(words) - 1,
        eos_token_id=0,
        forced_eos_token_id=0,
        num_beams=1,
    )
    MarianMTModel(config).save_pretrained(root)
    return root


@pytest.fixture
def rewriter(marian_dir: Path, base_dir: Path, tmp_path: Path) -> Rewriter:
    cache = tmp_path / "cache" / "rewrites.jsonl"
    return Rewriter({"es": str(marian_dir)}, str(base_dir), cache, batch_size=2, max_new_tokens=8)


def translated(directory: Path, text: str) -> str:
    """One text by transformers alone, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSeq2SeqLM.from_pretrained(directory)
    inputs = tokenizer(text, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True).strip()


def test_translation_is_the_models_own(marian_dir: Path) -> None:
    found = translator(str(marian_dir), "es", 8)(TEXTS)
    assert found == [translated(marian_dir, f">>es<< {text}") for text in TEXTS]
    assert len(set(found)) > 1
    # The token's three letters, and a language that the model has no token for.
    french = translator(str(marian_dir), "fr", 8)(TEXTS)
    assert french == [translated(marian_dir, f">>fra<< {text}") for text in TEXTS]
    german = translator(str(marian_dir), "de", 8)(TEXTS)
    assert german == [translated(marian_dir, text) for text in TEXTS]


def plain_base(base: Path, out: Path) -> Path:
    """The tiny base without a chat template, as the paper's tone model is."""
    shutil.copytree(base, out)
    (out / "chat_template.jinja").unlink(missing_ok=True)
    return out


def said(directory: Path, prompt: str, special: bool) -> str:
    """One answer by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=special)])
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True).partition("###")[0].strip()


@pytest.mark.parametrize("tone", ["witty", "paraphrase"])
def test_a_tuned_tone_model_is_asked_as_it_was_tuned(
    base_dir: Path, tmp_path: Path, tone: str
) -> None:
    task = {
        "witty": "Change the tone of the following Input sentence to witty.",
        "paraphrase": "Generate a paraphrase for the following Input sentence.",
    }[tone]
    plain = plain_base(base_dir, tmp_path / "plain")
    texts = ["Hi.", "I like {tea}."]
    expected = [
        said(plain, f"### Instruction:\n{task}\n\n### Input:\n{text}\n\n### Response:\n", True)
        for text in texts
    ]
    assert tone_changer(str(plain), tone, 8)(texts) == expected


def test_a_chat_model_is_asked_in_a_turn(base_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    ask = "Change the tone of the following text to casual. Answer with the new text alone.\n"
    turn = [{"role": "user", "content": f"{ask}Hi."}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert tone_changer(str(base_dir), "casual", 8)(["Hi."]) == [said(base_dir, prompt, False)]


def test_results_are_kept_and_shared(rewriter: Rewriter, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*TEXTS, TEXTS[0]]
    first = rewriter("es", texts)
    assert first[0] == first[3]
    lines = rewriter.cache.read_text().splitlines()
    assert len(lines) == len(TEXTS)

    def refuse(*arguments: object) -> None:
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr(rewriting, "translator", refuse)
    assert rewriter("es", texts[::-1]) == first[::-1]
    with pytest.raises(AssertionError, match="loaded again"):
        rewriter("es", ["I like cake."])


def test_a_kill_loses_one_batch(rewriter: Rewriter, monkeypatch: pytest.MonkeyPatch) -> None:
    real = translator
    batches: list[list[str]] = []

    def dying(path: str, code: str, most: int) -> rewriting.Write:
        write = real(path, code, most)

        def once(texts: list[str]) -> list[str]:
            batches.append(texts)
            if len(batches) == 2:
                raise KeyboardInterrupt
            return write(texts)

        return once

    monkeypatch.setattr(rewriting, "translator", dying)
    with pytest.raises(KeyboardInterrupt):
        rewriter("es", TEXTS)
    kept = rewriter.cache.read_bytes()
    assert kept.count(b"\n") == 2
    with rewriter.cache.open("ab") as stream:  # half of a line, as a kill would leave it
        stream.write(kept[:30])
    assert rewriter("es", TEXTS) == real(rewriter.translation["es"], "es", 8)(TEXTS)
    assert batches[2:] == batches[1:2]
    assert rewriter.cache.read_bytes().startswith(kept)
    assert rewriter.cache.read_bytes().count(b"\n") == len(TEXTS)


def test_another_model_another_result(
    rewriter: Rewriter, base_dir: Path, tmp_path: Path, marian_dir: Path
) -> None:
    rewriter("witty", TEXTS[:1])
    rewriter("casual", TEXTS[:1])
    other = plain_base(base_dir, tmp_path / "other")
    Rewriter({}, str(other), rewriter.cache, 2, 8)("witty", TEXTS[:1])
    assert len(rewriter.cache.read_text().splitlines()) == 3
    moved = shutil.copytree(base_dir, tmp_path / "moved")
    Rewriter({}, str(moved), rewriter.cache, 2, 8)("witty", TEXTS[:1])
    assert len(rewriter.cache.read_text().splitlines()) == 3


def check(rewriter: Rewriter, form: str, texts: list[str], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        rewriter(form, texts)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_are_one_line(
    rewriter: Rewriter, tmp_path: Path, marian_dir: Path, base_dir: Path
) -> None:
    check(rewriter, "it", TEXTS, "found the form 'it'; use one of: es, fr, de, professional")
    check(rewriter, "fr", TEXTS, "data.paper.translation.fr: missing; name the model that writes")
    check(Rewriter({}, None, rewriter.cache), "witty", TEXTS, "data.paper.tone: missing; name the")
    gone = str(tmp_path / "gone")
    check(Rewriter({"es": gone}, gone, rewriter.cache), "es", TEXTS, "no such directory")
    check(Rewriter({"es": gone}, gone, rewriter.cache), "casual", TEXTS, "no such directory")
    check(rewriter, "es", ["I like tea! " * 60], "leave out the one that begins with 'I like tea!")
    check(rewriter, "witty", ["I like tea! " * 60], "leave out the one that begins with 'I like")
    crossed = Rewriter({"es": str(base_dir)}, str(marian_dir), rewriter.cache)
    check(crossed, "witty", TEXTS, "a sequence-to-sequence model, expected a causal language model")
    check(crossed, "es", TEXTS, "not loadable as a translation model")


def test_pickles_are_refused(rewriter: Rewriter, marian_dir: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(marian_dir, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    other = Rewriter({"es": str(pickled)}, None, rewriter.cache)
    check(other, "es", TEXTS, "pickled weights, expected safetensors; convert them first")


def test_a_damaged_or_busy_cache(rewriter: Rewriter, tmp_path: Path) -> None:
    rewriter("es", TEXTS[:1])
    with rewriter.cache.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        check(rewriter, "es", TEXTS[:1], "another run is writing it; wait for that or name another")
    rewriter.cache.write_text('{"key": "1", "output": 2}\n')
    check(rewriter, "es", TEXTS[:1], "line 1: expected key and output, two strings; remove the")
    rewriter.cache.write_text("junk\n")
    check(rewriter, "es", TEXTS[:1], "not a cache of rewritten texts")
    (tmp_path / "file").write_text("")
    inside = Rewriter(rewriter.translation, None, tmp_path / "file" / "cache.jsonl")
    check(inside, "es", TEXTS[:1], "is a file, expected a directory")
