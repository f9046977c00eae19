"""Recipes: the shipped ones are valid, and each mistake is one line that names the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from caliport.core.errors import InputError
from caliport.recipe.read import read_recipe
from caliport.recipe.schema import prompts_of

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
        ("compositions.both=[summarize, sing]", "names the task 'sing', which has no adapter"),
        ("name=../up", "name: found '../up', string should match pattern"),
        ("adapters={a/b: x}", "names the task 'summarize'"),
        ("lora.train=null", "adapters.summarize has no path and lora.train is missing"),
        ("calibration.methods=[linear]", None),
        ("export.method=lc", None),
        ("export.ship=[]", "export.ship: found []"),
    ],
)
def test_overrides_and_mistakes(change: str, says: str | None) -> None:
    path = ROOT / "recipes" / "demo.yaml"
    if says is None:
        assert read_recipe(path, [change]) != read_recipe(path)
        return
    with pytest.raises(InputError) as caught:
        read_recipe(path, [change])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"- a\n- b\n", "found list"),
        (b"a: [", "not YAML"),
        (b"\xff\xfe", "not readable as UTF-8"),
        (b"name: x\n", "data: missing"),
    ],
)
def test_files_that_are_no_recipes(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value)


def test_missing_recipe_and_bad_override(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such recipe"):
        read_recipe(tmp_path / "gone.yaml")
    with pytest.raises(InputError, match="expected FIELD=VALUE"):
        read_recipe(ROOT / "recipes" / "demo.yaml", ["lora.rank"])
    with pytest.raises(InputError, match="rank has no subfields"):
        read_recipe(ROOT / "recipes" / "demo.yaml", ["lora.rank.x=1"])


@pytest.mark.parametrize("field", ["lora.train", "calibration.overrides.joint"])
def test_every_sweep_needs_held_out_examples(field: str) -> None:
    changes = [f"{field}={{steps: 3, learning_rate: [1.0e-3, 2.0e-3]}}"]
    with pytest.raises(InputError, match=r"need calibration\.tuning"):
        read_recipe(ROOT / "recipes" / "demo.yaml", changes)
    read_recipe(ROOT / "recipes" / "demo.yaml", [*changes, "calibration.tuning=10"])


def test_a_bundle_for_executorch_needs_names_of_methods() -> None:
    path = ROOT / "recipes" / "demo.yaml"
    changes = ["compositions={a-b: [summarize, translate_es]}", "export.ship=[bundle]"]
    with pytest.raises(InputError, match=r"compositions\.a-b: .*'a-b', expected letters"):
        read_recipe(path, changes)
    assert read_recipe(path, [*changes, "export.runtimes=[onnx]"]).export.ship == ("bundle",)
