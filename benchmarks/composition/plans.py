"""What each benchmark runs: its recipe, what is swept, and which methods on which seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caliport.data.pocket import LANGUAGES, TONES
from caliport.recipe.methods import MERGED, WEIGHTED, parse

HERE = Path(__file__).parent
MERGES = tuple(name for name in (*MERGED, *WEIGHTED) if name != "linear")
"""Every merge but the linear one, which each plan has among its core methods."""
TRAINED = ("lc", "lc++", "scales-per-layer", "joint")
"""Methods whose learning rate is swept; their variants use the same rate."""
VARIANTS = ("scales", "lc-per-layer", "lc++-per-layer", "lc-alone", "lc++-alone")
SHARED = ("lc-shared", "lc++-shared")
OTHERS = ("zero-shot", "multi-step")


@dataclass(frozen=True)
class Plan:
    """One benchmark.

    Attributes:
        recipe: Everything but the methods and the swept learning rates.
        sweep_on: The composition that learning rates are swept on, with the first seed.
        rates: Learning rates to try, equally many for each method.
        seeds: For the order of examples and all initial values but the base's.
        core: Methods run for every composition and seed.
        others: Methods without an adapter of their own, run with the first seed.
        merges: Methods run for every composition with the first seed.
        more: Methods run for ``more_on`` only, with the first seed.
        quantized: Precisions that methods are also scored in.
        groups: Columns of the tables, each with its compositions.
    """

    recipe: Path
    sweep_on: str
    rates: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    core: tuple[str, ...]
    others: tuple[str, ...]
    merges: tuple[str, ...]
    more: tuple[str, ...]
    more_on: tuple[str, ...]
    quantized: dict[str, list[str]]
    groups: dict[str, tuple[str, ...]]


def fields_of(method: str) -> str:
    """The recipe's field for the learning rate of a swept method."""
    return f"calibration.{parse(method).kind}.learning_rate"


_INT4 = {"int4": ["lc++", "lc++-int4"], "int4-bundle": ["lc++", "lc++-int4-bundle"]}

PLANS: dict[str, Plan] = {
    "multi30k": Plan(
        recipe=HERE / "multi30k.yaml",
        sweep_on="describe_de",
        rates={
            "lc": (3e-3, 1e-2, 3e-2),
            "lc++": (3e-3, 1e-2, 3e-2),
            "scales-per-layer": (1e-2, 3e-2, 1e-1),
            "joint": (1e-3, 3e-3, 1e-2),
        },
        seeds=(0, 1, 2),
        core=("linear", *TRAINED, "lc++-int4", "mixture", "flix"),
        others=OTHERS,
        merges=(*MERGES, *SHARED),
        more=("lc++-int4-bundle", *VARIANTS),
        more_on=("describe_de",),
        quantized=_INT4,
        groups={code: (f"describe_{code}",) for code in ("de", "fr", "cs")},
    ),
    "pocket": Plan(
        recipe=HERE / "pocket.yaml",
        sweep_on="summarize_es",
        rates={
            "lc": (5e-3, 1e-2, 2e-2),
            "lc++": (1e-2, 2e-2, 4e-2),
            "scales-per-layer": (1e-2, 3e-2, 1e-1),
            "joint": (5e-3, 1e-2, 2e-2),
        },
        seeds=(0,),
        core=("linear", *TRAINED),
        others=OTHERS,
        merges=(*MERGES, *SHARED),
        more=("lc++-int4", "lc++-int4-bundle", *VARIANTS),
        more_on=("summarize_es", "summarize_casual_es"),
        quantized=_INT4,
        groups={
            f"{main} + {kind}": tuple(f"{main}_{form}" for form in forms)
            for main in ("summarize", "reply")
            for kind, forms in (("translation", LANGUAGES), ("tone", TONES))
        }
        | {"three tasks": ("summarize_casual_es",)},
    ),
}


def rounds_of(plan: Plan, seed: int) -> list[tuple[tuple[str, ...], tuple[str, ...] | None]]:
    """Methods and their compositions (None: all), the most important first."""
    if seed:
        return [(plan.core, None)]
    return [
        ((*plan.core, *plan.others), None),
        (plan.merges, None),
        (plan.more, plan.more_on),
    ]


def has(plan: Plan, composition: str, seed: int, method: str) -> bool:
    """Whether a benchmark runs this method for a composition with a seed."""
    return any(
        method in methods and composition in (on or (composition,))
        for methods, on in rounds_of(plan, seed)
    )


def overrides(changes: dict[str, Any]) -> list[str]:
    """Changes of a recipe's fields in the form that ``read_recipe`` takes."""
    import json

    return [f"{field}={json.dumps(value)}" for field, value in changes.items()]
