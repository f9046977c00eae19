from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from caliport.core.checkpoints import load_base, load_tokenizer
from caliport.core.errors import InputError
from caliport.validation.evaluation.quality import generate, judge, metric, score, weighted_rouge
from caliport.validation.runners.eager import EagerRunner
from caliport.validation.runners.runner import greedy


@pytest.fixture(scope="module")
def model(base_dir: Path) -> PreTrainedModel:
    return load_base(base_dir)


@pytest.fixture(scope="module")
def tokenizer(base_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(base_dir)


@pytest.mark.parametrize(
    ("hypothesis", "reference", "expected"),
    [
        # subsequence "the cat on mat": 4 of 4 words said, 4 of 6 wanted
        ("the cat on mat", "The cat sat on the mat.", 100 * 2 * 1 * (4 / 6) / (1 + 4 / 6)),
        ("straße", "Straße", 100),
        ("strasse", "straße", 0),
        ("un café más", "un cafe más", 100 * 2 / 3),
        ("", "etwas", 0),
        ("москва", "Москва", 100),
    ],
)
def test_rouge_l_by_hand(hypothesis: str, reference: str, expected: float) -> None:
    assert metric("rougeL", [hypothesis], [reference]) == [pytest.approx(expected)]


def test_chrf_by_hand() -> None:
    # One letter, one 1-gram in common and no longer n-gram that both have.
    assert metric("chrf", ["é", "x"], ["é", "é"]) == [pytest.approx(100), 0]


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("I like green tea.", "i like green tea", 100),
        # words 3 of 4 and 3 of 4; pairs "i like" of 3 and of 3; no three in a row
        ("I like black tea", "I like green tea", 100 * (0.75 / 6 + (1 / 3) / 3)),
        # words 3 of 3 and of 5, pairs 2 of 2 and of 4, triples 1 of 1 and of 3
        ("très bon thé", "un très bon thé vert", 100 * (0.75 / 6 + (2 / 3) / 3 + 0.5 / 2)),
        ("yes", "yes", 100 / 6),
        ("été", "ete", 0),
        ("", "something", 0),
    ],
)
def test_weighted_rouge_by_hand(prediction: str, reference: str, expected: float) -> None:
    assert weighted_rouge(prediction, reference) == pytest.approx(expected)
    assert metric("weighted_rouge", [prediction], [reference]) == [pytest.approx(expected)]


def test_a_score_has_every_metric() -> None:
    found = judge(["a b c", "x"], ["a b c", "y"], None)
    assert found.examples["weighted_rouge"] == [pytest.approx(100), 0]
    assert list(found.examples) == ["rougeL", "chrf", "weighted_rouge"]


def test_metrics_refuse_what_they_cannot_score() -> None:
    with pytest.raises(InputError, match="metric 'bleu' is not known, expected one of rougeL"):
        metric("bleu", ["a"], ["a"])
    with pytest.raises(InputError, match="1 outputs for 2 references"):
        metric("chrf", ["a"], ["a", "b"])
    with pytest.raises(InputError, match="no examples"):
        judge([], [], None)


def test_loss_is_the_mean_over_reference_tokens_and_end(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    references = ["the park", "Anna y Tom quedan el viernes", "à midi"]
    found = score(model, tokenizer, prompts, references, max_new_tokens=4, batch_size=2)
    losses = []
    for prompt, text in zip(prompts, references, strict=True):
        target = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        with torch.no_grad():
            chances = model(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        rows = range(len(prompt) - 1, len(prompt) + len(target) - 1)
        losses += [-chances[row, token].item() for row, token in zip(rows, target, strict=True)]
    assert found.loss is not None
    assert math.isclose(found.loss, sum(losses) / len(losses), rel_tol=1e-4)
    assert len(found.outputs) == len(found.examples["chrf"]) == 3


def test_batched_generation_is_greedy_decoding_one_by_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    done: list[int] = []
    batched = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=10,
        batch_size=3,
        progress=lambda n, _: done.append(n),
    )
    runner = EagerRunner(model, "eager")
    ends = {tokenizer.eos_token_id}
    assert batched == [greedy(runner, prompt, 10, ends) for prompt in prompts]
    assert done == [3]
