"""The command ``calibrate``: adapters in, one composed adapter out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from caliport.cli.options import (
    AnyBase,
    BaseOption,
    ForceOption,
    Out,
    Overrides,
    Prompt,
    Recipe,
    Runs,
    alone_in,
    needed,
    no_flags,
)
from caliport.cli.recipes import only_main, show_report
from caliport.core.errors import InputError
from caliport.core.prompts import PLAIN
from caliport.recipe.methods import CORRECTED, MERGED, WEIGHTED


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(calibrate)


def calibrate(
    recipe: Recipe = None,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    base: BaseOption = None,
    adapter: Annotated[
        list[Path] | None, typer.Option("--adapter", help="PEFT LoRA directory; repeatable.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(MERGED)}; {', '.join(WEIGHTED)}; {', '.join(CORRECTED)}, with "
            "variants such as lc++-per-layer or lc++-int4; flix (docs/calibrate.md)."
        ),
    ] = "lc++",
    merge: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(MERGED),
            help="The merge under a correction; default linear, or exact for adapters of "
            "different ranks or modules.",
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight",
            metavar="NUMBER|search",
            help="Weight in the merge, also under a correction, once for each --adapter; or "
            "search: of 0.5 and 1 the best on held-out --data; default equal.",
        ),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of values that ties and dare keep; default 0.5.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="NAME",
            help="Layers that a correction reaches besides the adapters' own, such as down_proj; "
            "repeatable.",
        ),
    ] = None,
    dora: Annotated[
        str | None,
        typer.Option(
            metavar="svd|svd=RANK",
            help="Replace DoRA adapters by the nearest low-rank update; default twice their rank.",
        ),
    ] = None,
    any_base: AnyBase = False,
    data: Annotated[
        Path | None, typer.Option(help="Training data: JSON Lines with `input` and `output`.")
    ] = None,
    prompt: Prompt = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of a correction.", min=1)] = 300,
    batch_size: Annotated[int, typer.Option(help="Examples per step.", min=1)] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-4,
    seed: Annotated[int, typer.Option(help="Random seed of training.")] = 0,
    rank: Annotated[
        list[str] | None,
        typer.Option("--rank", help="FLix: NAME=RANK of a feature to train; repeatable."),
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="FLix: directory of earlier features, kept frozen.")
    ] = None,
    out: Out = None,
    force: ForceOption = False,
) -> None:
    """Train a recipe's adapters, merge and calibrate them, and score every method."""
    if recipe is not None:
        from caliport.run.compose import compose_all
        from caliport.run.score import score_all

        no_flags(base=base, adapter=adapter, data=data, prompt=prompt, weight=weight, merge=merge)
        no_flags(rank=rank, features=features, out=out, dora=dora, density=density, target=target)
        no_flags(**{"any-base": any_base})
        with alone_in(recipe, overrides, runs) as space:
            compose_all(space)
            score_all(space)
            only_main()
            show_report(space.reports)
        return
    from caliport.flags.calibrate import Steering, calibrate_one, features_one, inputs_of
    from caliport.stages.sources import Source

    training = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    if method == "flix":
        given = {"dora": dora, "merge": merge, "weight": weight, "density": density}
        for flag, value in {**given, "target": target}.items():
            if value:
                raise InputError(f"--{flag} goes with --adapter; flix trains its own")
        base, data, rank, place = needed(base=base, data=data, rank=rank, out=out)
        source = Source(data, PLAIN if prompt is None else prompt)
        features_one(base, source, rank, training, features, place)
        return
    steering = Steering.of(merge, weight or [], density, target or [])
    steering = replace(steering, any_base=any_base)
    base, adapters, place = needed(base=base, adapter=adapter, out=out)
    inputs = inputs_of(adapters, data, prompt)
    calibrate_one(base, inputs, method, training, steering, place, dora)
