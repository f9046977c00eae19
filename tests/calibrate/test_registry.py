"""Merges, weight searches and corrections: one file each, listed everywhere by its name alone."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from commands import ENVIRONMENT, ROOT

from caliport.calibrate import read_peft
from caliport.calibrate.corrections.registry import CORRECTIONS
from caliport.calibrate.merges.by_loss.registry import WEIGHT_SEARCHES
from caliport.calibrate.merges.exact import exact
from caliport.calibrate.merges.registry import MERGES

REGISTRIES = {"merges": MERGES, "weight searches": WEIGHT_SEARCHES, "corrections": CORRECTIONS}
ENTRIES = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry]


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_entry_states_its_facts(kind: str, name: str) -> None:
    entry = REGISTRIES[kind][name]
    assert entry.name == name
    assert entry.label
    assert entry.source
    for parameter, default in entry.parameters.items():
        assert default is None or isinstance(default, (int, float)), parameter


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_entry_has_a_row_in_the_documentation(kind: str, name: str) -> None:
    text = (ROOT / "docs" / "calibrate.md").read_text(encoding="utf-8")
    assert f"\n| `{name}` |" in text
    for paper in re.findall(r"arXiv [\d.]+\d", REGISTRIES[kind][name].source):
        assert paper in text


def test_names_are_listed_without_torch() -> None:
    check = "import sys, caliport.cli.app; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], env=ENVIRONMENT, check=True)


MERGE = """
    from caliport.calibrate.low_rank import LowRankUpdate
    from caliport.calibrate.merges.common import Merge
    from caliport.calibrate.merges.exact import exact


    def halved(updates, weights=None, density=0.4):
        whole = exact(updates, weights)
        return LowRankUpdate(whole.a, {n: density * b for n, b in whole.b.items()})


    MERGE = Merge("halved-sum", "half the sum", "this test", "", "it is scaled", halved)
"""
CORRECTION = """
    from caliport.calibrate.corrections.common import CorrectionType
    from caliport.calibrate.corrections.lc import LC


    CORRECTION = CorrectionType("lc+", "another LC", "this test", "", True, LC)
"""
LAUNCH = """
    import sys
    import caliport.calibrate.corrections, caliport.calibrate.merges
    caliport.calibrate.merges.__path__.append("merges")
    caliport.calibrate.corrections.__path__.append("corrections")
    from caliport.cli.main import main
    main()
"""


def launch(place: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch.py", *map(str, arguments)]
    return subprocess.run(command, cwd=place, env=ENVIRONMENT, text=True, capture_output=True)


def test_a_new_merge_and_a_new_correction_are_one_file_each(
    base_dir: Path, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    """The command, its help, recipes and the audit know them without any other change."""
    for file, text in (
        ("merges/halved_sum.py", MERGE),
        ("corrections/lc_plus.py", CORRECTION),
        ("launch.py", LAUNCH),
    ):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(textwrap.dedent(text))
    (tmp_path / "data.jsonl").write_text('{"input": "a b", "output": "b a"}\n' * 4)
    adapters = [flag for path in adapter_dirs for flag in ("--adapter", path)]

    help_text = launch(tmp_path, "calibrate", "--help").stdout
    assert "halved-sum" in help_text
    assert "lc+," in help_text

    done = launch(
        tmp_path, "calibrate", "--base", base_dir, *adapters, "--method", "halved-sum",
        "--out", "halved",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wanted = exact([read_peft(path) for path in adapter_dirs])
    found = read_peft(tmp_path / "halved")
    name = wanted.modules[0]
    assert (found.delta(name) * 2 - wanted.delta(name)).abs().max() < 1e-5

    done = launch(
        tmp_path, "calibrate", "--base", base_dir, *adapters, "--method", "lc+-per-layer",
        "--data", "data.jsonl", "--steps", 2, "--out", "corrected",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_peft(tmp_path / "corrected").rank(name) == read_peft(adapter_dirs[0]).rank(name) + 1

    done = launch(tmp_path, "audit", *adapter_dirs)
    assert "halved-sum: " in done.stdout
    assert "it is scaled" in " ".join(done.stdout.split())

    check = """
        from pathlib import Path
        from caliport.recipe.read import read_recipe
        recipe = read_recipe(Path(sys.argv[1]), sys.argv[2:])
        print(recipe.calibration.merge, [recipe.calibration.training(parse(m)).steps
                                         for m in recipe.calibration.methods])
    """
    text = (
        textwrap.dedent(LAUNCH)
        .replace("main()\n", "")
        .replace("from caliport.cli.main import main", "from caliport.recipe.methods import parse")
    )
    (tmp_path / "launch.py").write_text(text + textwrap.dedent(check))
    done = launch(
        tmp_path, ROOT / "recipes" / "toy.yaml", "calibration.merge=halved-sum",
        "calibration.methods=[lc+]", "export.method=lc+",
    )  # fmt: skip
    assert done.stdout.strip() == "halved-sum [300]", done.stderr
