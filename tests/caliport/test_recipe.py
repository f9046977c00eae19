"""Recipes: the shipped ones are valid, and each mistake is one line that names the field."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from caliport.calibrate import read_peft
from caliport.core.directories import check_files
from caliport.core.errors import InputError
from caliport.core.prompts import recorded_prompt
from caliport.recipe.read import read_recipe
from caliport.recipe.schema import prompts_of
from caliport.recipe.yaml_file import parse_yaml

LAUGHS = b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 20)
)
"""Ten of ten of ten …"""
ROOT = Path(__file__).parents[2]
SHIPPED = [
    *sorted((ROOT / "recipes").glob("*.yaml")),
    ROOT / "caliport" / "flags" / "template.yaml",
]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe = read_recipe(path)
    assert set(recipe.adapters) | set(recipe.compositions) <= set(prompts_of(recipe))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("lora.rnak=4", "lora.rnak: unknown field; did you mean rank?"),
        ("calibration.lc+=1", "calibration.lc+: unknown field; did you mean lc++?"),
        ("base.train.stepz=5", "base.train.stepz: unknown field; did you mean steps?"),
        (
            "validation.regression.sise=1",
            "validation.regression.sise: unknown field; did you mean size?",
        ),
        ("validation.regression.size=-1", "validation.regression.size: found -1, input should be"),
        ("lora.rank=many", "lora.rank: found 'many', input should be a valid integer"),
        ("lora.rank=0", "lora.rank: found 0, input should be greater than 0"),
        ("export.precisions=[int3]", "export.precisions.0: found 'int3', input should be 'fp32'"),
        ("data.source=web", "data.source: found 'web', input should be 'pocket'"),
        ("data.source=multi30k", "data: source multi30k needs `directory`"),
        ("data.source=files", "data: source files needs `files`"),
        ("base.path=x", "base: needs either `path`"),
        ("compositions.both=[summarize]", "compositions.both needs at least two tasks"),
        ("compositions={}", "compositions: found {}, dictionary should have at least 1 item"),
        ("compositions.both=[summarize, sing]", "names the task 'sing', which has no adapter"),
        ("name=../up", "name: found '../up', string should match pattern"),
        ("adapters={a/b: x}", "names the task 'summarize'"),
        ("lora.train=null", "adapters.summarize has no path and lora.train is missing"),
        ("calibration.methods=[linear]", None),
        ("export.method=lc", None),
        ("export.ship=[]", "export.ship: found []"),
        ("base.train.steps=1000000000000000000", "base.train.steps: found an integer of more than"),
        (f"base.train.steps={'9' * 5000}", "--set base.train.steps: not YAML"),
        ("base.train.steps=true", "base.train.steps: found true, expected a number"),
        ("base.train.steps=0x" + "f" * 5000, "base.train.steps: found an integer of more than 18"),
        ("base.train.batch_size=-1", "base.train.batch_size: found -1"),
        ("base.train.learning_rate=.nan", "base.train.learning_rate"),
        ("base.train.learning_rate=[]", "base.train.learning_rate"),
        ("base.train.learning_rate=[1.0e-3, .inf]", "base.train.learning_rate"),
        ("base.train.warmup=.nan", "base.train.warmup: found nan"),
        ("lora.alpha=1.0e+400", "lora.alpha: found inf"),
        ("lora.alpha=1.0e+38", "lora.alpha: found 1e+38"),
        ("lora.rank=100000000", "lora.rank: found 100000000"),
        ("seed=99999999999999", "seed: found 99999999999999"),
        ("calibration.density=.nan", "calibration.density: found nan"),
        ("validation.threads=1000000000000", "validation.threads: found"),
        ("validation.limits.int4.kl=.nan", "validation.limits.int4.kl: found nan"),
        ("validation.limits.int4.kl=-1", "validation.limits.int4.kl: found -1"),
        ("validation.limits.int4.confidence=1", "limits.int4.confidence: expected more than 0"),
        (
            "validation.limits.int4.speed=1",
            "validation.limits.int4.speed.[key]: expected one of max_abs",
        ),
        ("validation.regression.kl=.inf", "validation.regression.kl: found inf"),
        ("validation.repetitions=1000000", "validation.repetitions: found 1000000"),
        ("export.context=100000000000", "export.context: found 100000000000"),
        ("name=" + "n" * 300, "name: found 'nnn"),
        ("compositions={../../up: [summarize, translate_es]}", "'../../up': expected a name of"),
        (f"compositions={{{'n' * 101}: [summarize, translate_es]}}", "of at most 100 bytes"),
        ("compositions={'': [summarize, translate_es]}", "the task '': expected a name of letters"),
        ('compositions={"a\\u001bb": [summarize, translate_es]}', "expected a name of letters"),
        (
            "flix={ranks: {../../pwn: 1}, features: {}, train_on: [], train: {steps: 1}}",
            "'../../pw",
        ),
        (
            "flix={ranks: {/etc/x: 1}, features: {}, train_on: [], train: {steps: 1}}",
            "'/etc/x': ex",
        ),
        (
            "flix={ranks: {a.b: 1}, features: {}, train_on: [], train: {steps: 1}}",
            "'a.b': expected",
        ),
        ('base={path: "a\\0b"}', None),
        ('validation.baseline="a\\nb"', "validation.baseline: a b: has a control character"),
        (f"validation.baseline={'n' * 300}", "is too long"),
        ("a.a.a.a.a.a.a.a.a.a=1", "expected a field of at most 9 parts"),
        (
            "lora.rank={on: 1}",
            "--set lora.rank, line 1: the key 'on' is a bool; put it into quotes",
        ),
        ("name=2024-01-01", "is a date, expected text"),
    ],
)
def test_overrides_and_mistakes(change: str, says: str | None) -> None:
    path = ROOT / "recipes" / "toy.yaml"
    if says is None:
        assert read_recipe(path, [change]) != read_recipe(path)
        return
    with pytest.raises(InputError) as caught:
        read_recipe(path, [change])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "--set" in str(caught.value) or str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"- a\n- b\n", "found list"),
        (b"a: [", "not YAML"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b"a: 1\nb: 2\na: 3\n", "line 3: 'a' is there twice"),
        (b"a: {b: 1, b: 2}", "line 1: 'b' is there twice"),
        (b"on: 1\n", "line 1: the key 'on' is a bool; put it into quotes"),
        (b"1: 1\n", "line 1: the key '1' is a int; put it into quotes"),
        (b"null: 1\n", "line 1: the key 'null' is a null; put it into quotes"),
        (b"? [a]\n: 1\n", "line 1: a sequence as a key"),
        (b"a: !!python/object/apply:os.system [x]\n", "could not determine a constructor"),
        (b"a: !!python/name:os.system\n", "could not determine a constructor"),
        (b"a: !!set {b, c}\n", "is a set, expected text"),
        (b"a: !!timestamp x\n", "a value does not fit its !!tag"),
        (b"a: !!bool x\n", "a value does not fit its !!tag"),
        (b"a: !!float x\n", "not YAML"),
        (b"a: !!int ''\n", "not YAML"),
        (b"a: 2024-99-99\n", "month must be in"),
        (b"a: " + b"9" * 5000, "not YAML"),
        (b"a: &a [*a]\n", "nested too deep"),
        (b"a: " + b"[" * 60_000, "nested too deep"),
        (b"a: " + b"[" * 200 + b"]" * 200, "nested too deep"),
        (b"a: " + b"{b: " * 200 + b"1" + b"}" * 200, "nested too deep"),
        (b"- " * 50_000, "nested too deep"),
        (LAUGHS, "more than 20,000 values"),
        (b"a: " + b"x" * 300_000, "300,003 bytes, expected at most 262,144"),
        (b"\x00\x01", "not YAML"),
        (b"%YAML 9.9\n---\na: 1", "not YAML"),
        (b"a: 1\n---\nb: 2\n", "not YAML: expected a single document"),
        (b"a: \x1b[31mred\n", "not YAML"),
        (b"", "found NoneType"),
        (b"name: x\n", "data: missing"),
    ],
)
def test_files_that_are_no_recipes(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["/dev/zero", "pipe", "directory", "n" * 5000, "a\nb"])
def test_places_that_hold_no_recipe(place: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    with pytest.raises(InputError) as caught:
        read_recipe(tmp_path / place)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_references_are_followed_and_an_override_changes_one_place(tmp_path: Path) -> None:
    value = parse_yaml("a: &one {x: 1, y: [2]}\nb: *one\nc: {<<: *one, x: 3}\n", "r.yaml")
    assert value == {"a": {"x": 1, "y": [2]}, "b": {"x": 1, "y": [2]}, "c": {"x": 3, "y": [2]}}
    assert value["a"] is not value["b"]
    assert value["a"]["y"] is not value["c"]["y"]


def test_missing_recipe_and_bad_override(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such recipe"):
        read_recipe(tmp_path / "gone.yaml")
    with pytest.raises(InputError, match="expected FIELD=VALUE"):
        read_recipe(ROOT / "recipes" / "toy.yaml", ["lora.rank"])
    with pytest.raises(InputError, match="rank has no subfields"):
        read_recipe(ROOT / "recipes" / "toy.yaml", ["lora.rank.x=1"])


@pytest.mark.parametrize("field", ["lora.train", "calibration.overrides.joint"])
def test_every_sweep_needs_held_out_examples(field: str) -> None:
    changes = [f"{field}={{steps: 3, learning_rate: [1.0e-3, 2.0e-3]}}"]
    with pytest.raises(InputError, match=r"need calibration\.tuning"):
        read_recipe(ROOT / "recipes" / "toy.yaml", changes)
    read_recipe(ROOT / "recipes" / "toy.yaml", [*changes, "calibration.tuning=10"])


def test_a_bundle_for_executorch_needs_names_of_methods() -> None:
    path = ROOT / "recipes" / "toy.yaml"
    changes = ["compositions={a-b: [summarize, translate_es]}", "export.ship=[bundle]"]
    with pytest.raises(InputError, match=r"compositions\.a-b: .*'a-b', expected letters"):
        read_recipe(path, changes)
    assert read_recipe(path, [*changes, "export.runtimes=[onnx]"]).export.ship == ("bundle",)


def test_the_demos_adapters_are_whole_small_and_for_its_base() -> None:
    recipe = read_recipe(ROOT / "recipes" / "demo.yaml")
    for path in recipe.adapters.values():
        assert path is not None
        check_files(ROOT / path)
        assert recorded_prompt(ROOT / path) == prompts_of(recipe)[path.name]
        settings = json.loads((ROOT / path / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == recipe.base.path
        assert (ROOT / path / "adapter_model.safetensors").stat().st_size < 2**20
        assert len(read_peft(ROOT / path).modules) == 60
