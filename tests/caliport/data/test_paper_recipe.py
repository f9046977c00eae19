"""The recipe of the paper's benchmark, and the data that its fields decide."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from caliport.core.errors import InputError
from caliport.data.examples import read_jsonl
from caliport.data.paper import COMPOSITIONS, PROMPTS, SIZES, TASKS
from caliport.recipe.read import read_recipe
from caliport.recipe.schema import prompts_of
from caliport.run.compose import make_data
from caliport.run.workspace import Workspace

RECIPE = Path(__file__).parents[3] / "benchmarks" / "composition" / "paper.yaml"


def test_the_papers_recipe() -> None:
    recipe = read_recipe(RECIPE)
    assert tuple(recipe.adapters) == TASKS
    assert recipe.compositions == COMPOSITIONS
    assert prompts_of(recipe) is PROMPTS
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (32, 16, 0.05)
    assert recipe.lora.train is not None
    assert recipe.lora.train.rates == recipe.calibration.joint.rates == (5e-5,)
    assert recipe.calibration.lc.rates == recipe.calibration.lcpp.rates == (5e-4,)
    passes = [recipe.calibration.lc, recipe.calibration.lcpp, recipe.calibration.joint]
    assert [-(-10_000 // train.batch_size) for train in passes] == [t.steps for t in passes]
    assert -(-SIZES["dialogsum"][0] // recipe.lora.train.batch_size) == recipe.lora.train.steps


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("data.paper=null", "data: source paper needs `directory`, the sets' folder, and `paper`"),
        ("evaluation.judge={path: x, endpoint: y}", "evaluation.judge: needs either `endpoint`"),
        ("evaluation.judge={endpoint: y}", "evaluation.judge: needs `endpoint` and `model` toget"),
        ("data.paper.split=train", "data.paper.split: found 'train', input should be 'validation'"),
        ("data.paper.translation={it: x}", "data.paper.translation.it"),
    ],
)
def test_mistakes_in_the_recipe(change: str, expected: str) -> None:
    with pytest.raises(InputError, match=re.escape(expected)) as caught:
        read_recipe(RECIPE, [change])
    assert "\n" not in str(caught.value)


def write_sets(root: Path) -> None:
    """DialogSum and Sound Natural in small."""
    (root / "dialogsum").mkdir(parents=True)
    (root / "sound_natural").mkdir()
    for part, names in (("train", ["summary"]), ("test", ["summary1", "summary2"])):
        rows = [
            {"dialogue": f"#Person1#: {part} {n}"} | {name: f"{name} of {n}." for name in names}
            for n in range(6)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / "dialogsum" / f"dialogsum.{part}.jsonl").write_text(lines)
        messages = "".join(f"tell Ann {n}\tare you there {n}?\n" for n in range(5))
        table = root / "sound_natural" / f"{part}.tsv"
        table.write_text(f"Query\tRephrased Content\n{messages}")


def talkative(base: Path, out: Path) -> Path:
    """The tiny base held to tokens that show, so that its random weights always write something."""
    shutil.copytree(base, out)
    tokenizer = AutoTokenizer.from_pretrained(base)
    blank = [
        i
        for i in range(len(tokenizer))
        if not tokenizer.decode([i], skip_special_tokens=True).strip().strip("#")
    ]
    path = out / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"suppress_tokens": blank}))
    return out


def test_the_recipes_fields_decide_the_data(tmp_path: Path, base_dir: Path) -> None:
    write_sets(tmp_path / "sets")
    cache = tmp_path / "runs" / "cache.jsonl"
    changes = {
        "data.directory": tmp_path / "sets",
        "data.train": 5,
        "data.paper.compositional": 4,
        "data.paper.tone": talkative(base_dir, tmp_path / "tone"),
        "data.paper.cache": cache,
        "adapters": "{summarize: null, tone_witty: null}",
        "compositions": "{summarize_witty: [summarize, tone_witty]}",
    }
    recipe = read_recipe(RECIPE, [f"{field}={value}" for field, value in changes.items()])
    space = Workspace(recipe, tmp_path / "runs" / "paper")
    make_data(space)
    found = {path.name: read_jsonl(path) for path in space.data.glob("*.jsonl")}
    assert {name: len(examples) for name, examples in found.items()} == {
        "summarize.train.jsonl": 5,
        "summarize.validation.jsonl": 12,
        "summarize_witty.train.jsonl": 4,
        "summarize_witty.validation.jsonl": 12,
        "tone_witty.train.jsonl": 5,
        "tone_witty.validation.jsonl": 5,
    }
    assert "test" in found["summarize.validation.jsonl"][0].input
    main = [one.input for one in found["summarize.train.jsonl"]]
    assert [one.input for one in found["summarize_witty.train.jsonl"]] == main[:4]
    # 12 test summaries, 4 of the training set, 5 messages that are the same in both splits.
    assert len(cache.read_text().splitlines()) == 21
