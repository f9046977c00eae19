"""Compare every method on a benchmark and write its tables to docs/results.md.

    python -m benchmarks.composition multi30k --data ../shared/data/multi30k
    python -m benchmarks.composition pocket

Everything is a stage of a run directory, so the same command continues a killed benchmark. With
``--seed`` only that seed is run, so that several can run in parallel. ``--tables`` writes tables of
the results that exist, without checking that they still match the recipe; a full run does check.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.composition.plans import (
    PLANS,
    TRAINED,
    Plan,
    fields_of,
    overrides,
    rounds_of,
)
from benchmarks.composition.tables import write_tables
from caliport.core.directories import read_manifest
from caliport.core.errors import InputError
from caliport.recipe.methods import parse
from caliport.recipe.read import read_recipe
from caliport.run.compose import compose, make_data, prepare_all
from caliport.run.resolve import variants_of
from caliport.run.score import score_method
from caliport.run.workspace import Workspace


def main(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(PLANS)}.")],
    data: Annotated[Path | None, typer.Option(help="Directory of the data set.")] = None,
    runs: Annotated[Path, typer.Option(help="Parent of the run directories.")] = Path("runs"),
    seed: Annotated[list[int] | None, typer.Option(help="Run only this seed; repeatable.")] = None,
    results: Annotated[Path, typer.Option(help="The file to write the tables to.")] = Path(
        "docs/results.md"
    ),
    tables: Annotated[
        bool, typer.Option(help="Run nothing; write tables of existing results.")
    ] = False,
) -> None:
    """Run a whole benchmark, or one seed of it."""
    if name not in PLANS:
        raise typer.BadParameter(f"{name!r}; expected one of {', '.join(PLANS)}")
    plan, common = PLANS[name], {} if data is None else {"data.directory": str(data)}
    first = _workspace(plan, runs, 0, common)
    if not tables:
        prepare_all(first)
    rates = _sweep(plan, runs, common, first)
    spaces = []
    for number in plan.seeds:
        space = _workspace(plan, runs, number, {**common, **rates}, first)
        if not tables and (seed is None or number in seed):
            _make(plan, space, number)
        spaces.append(space)
    if seed is None:
        write_tables(name, plan, spaces, rates, results)


def _make(plan: Plan, space: Workspace, seed: int) -> None:
    """Compose and score every method that the plan has for a seed."""
    prepare_all(space)
    for methods, compositions in rounds_of(plan, seed):
        for composition in compositions or space.recipe.compositions:
            for method in methods:
                if parse(method).composed:
                    compose(space, composition, parse(method))
                for variant in variants_of(space, method):
                    score_method(space, composition, method, variant)


def _workspace(
    plan: Plan, runs: Path, seed: int, changes: dict[str, Any], first: Workspace | None = None
) -> Workspace:
    """The run of one seed; later seeds use the first one's base."""
    methods = (*plan.core, *plan.others, *plan.merges, *plan.more)
    changes = {"calibration.methods": methods, "evaluation.quantized": plan.quantized, **changes}
    recipe = read_recipe(plan.recipe, overrides(changes))
    if not seed:
        return Workspace(recipe, runs / recipe.name)
    assert first is not None
    base = recipe.base.model_copy(update={"path": str(first.base), "train": None})
    recipe = recipe.model_copy(update={"name": f"{recipe.name}-{seed}", "seed": seed, "base": base})
    return Workspace(recipe, runs / recipe.name)


def _sweep(plan: Plan, runs: Path, common: dict[str, Any], first: Workspace) -> dict[str, float]:
    """The best learning rate of each method, by the recipe's field.

    All methods get equally many rates, with the same steps, batches and examples; the loss on
    held-out training examples decides.
    """
    changes = {fields_of(method): list(plan.rates[method]) for method in TRAINED}
    recipe = read_recipe(
        plan.recipe, overrides({"calibration.methods": TRAINED, **changes, **common})
    )
    tasks = recipe.compositions[plan.sweep_on]
    base = recipe.base.model_copy(update={"path": str(first.base), "train": None})
    recipe = recipe.model_copy(
        update={
            "name": f"{recipe.name}-sweep",
            "base": base,
            "adapters": {task: first.adapter(task) for task in tasks},
            "compositions": {plan.sweep_on: tasks},
            "flix": None,
        }
    )
    space = Workspace(recipe, runs / recipe.name)
    make_data(space)
    found = {}
    for method in TRAINED:
        compose(space, plan.sweep_on, parse(method))
        manifest = read_manifest(space.composed(plan.sweep_on, method))
        found[fields_of(method)] = manifest["learning_rate"]
    return found


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        sys.exit(f"benchmark: {error}")
