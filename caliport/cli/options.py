"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from caliport.core.errors import InputError
from caliport.core.outputs import forced
from caliport.core.prompts import check_prompt

Recipe = Annotated[
    Path | None, typer.Argument(help="A YAML recipe; without one, use the flags below.")
]
NeededRecipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a recipe's field; repeatable."),
]
Runs = Annotated[Path, typer.Option("--runs", help="Parent directory of run directories.")]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", help="Base model: Hugging Face directory, .gguf file or hub name."),
]
Adapter = Annotated[
    Path | None, typer.Option("--adapter", help="PEFT LoRA directory that is folded in.")
]


def _with_input(value: str | None) -> str | None:
    return None if value is None else check_prompt(value, "--prompt")


Prompt = Annotated[
    str | None,
    typer.Option(
        help="Prompt template; {input} is replaced by each input. Default the one that the adapter "
        "or artifact was trained with, if known, else {input} alone.",
        callback=_with_input,
    ),
]
AnyBase = Annotated[
    bool,
    typer.Option(
        "--any-base", help="Take adapters that name different bases, if their shapes fit."
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="The directory to write.")]
Bundle = Annotated[
    list[str] | None,
    typer.Option(
        "--bundle",
        metavar="NAME=DIR",
        help="A composition (PEFT LoRA directory) of a bundle, beside its base; repeatable.",
    ),
]
Share = Annotated[
    list[str] | None,
    typer.Option(
        "--share",
        metavar="NAME=DIR",
        help="An adapter that compositions of a bundle share, stored once; repeatable.",
    ),
]


CalibrationFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        metavar="[NAME=]FILE",
        help="Text that int4 is calibrated on: JSON Lines with `input` and `output` (.jsonl), "
        "or plain text; NAME=FILE for each composition of a bundle.",
    ),
]
CalibrationTokens = Annotated[
    int | None, typer.Option(help="Tokens of it to run; default 8192.", min=64)
]
MaxSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Keep as many layers of int4 at 8 bits as fit into this size, such as 95MB, those "
        "first that gain most for each byte; needs --calibration.",
    ),
]
TargetKl = Annotated[
    float | None,
    typer.Option(
        metavar="NATS",
        help="Keep as few layers of int4 at 8 bits as bring the divergence from float down to "
        "this; needs --calibration.",
    ),
]


def _force(ctx: typer.Context, value: bool) -> bool:
    ctx.with_resource(forced(value))  # until the command ends
    return value


ForceOption = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace the output even if caliport did not make it. Inputs are never replaced.",
        callback=_force,
    ),
]
BaselineOption = Annotated[
    Path | None,
    typer.Option(
        "--baseline",
        metavar="FILE_OR_DIR",
        help="Also compare with this stored baseline; worse results fail. See caliport baseline.",
    ),
]
"""Of the commands that validate."""


def with_baseline(overrides: Sequence[str] | None, baseline: Path | None) -> list[str]:
    """A recipe's overrides, and the option ``--baseline`` as one of them."""
    given = [] if baseline is None else [f"validation.baseline={json.dumps(str(baseline))}"]
    return [*(overrides or ()), *given]


DeviceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        metavar="SERIAL",
        help="Also use this device: a serial number, 'any', or requirements such as "
        "phone,arm64-v8a (docs/android.md); repeatable.",
    ),
]
"""Of the commands that can work on a device too."""


RunnerOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--runner",
        metavar="DIR",
        help="A directory made by caliport runner build; repeatable; default all in build.",
    ),
]


LlamaMainOption = Annotated[
    Path | None,
    typer.Option(
        "--llama-main",
        metavar="FILE",
        help="ExecuTorch's own runner, for .pte files; default build/llama_main.",
    ),
]


def space_of(recipe: Path, overrides: list[str] | None, runs: Path) -> Any:
    """The paths of a recipe's run."""
    from caliport.recipe.read import read_recipe
    from caliport.run.workspace import Workspace
    from caliport.validation.records.reports import check_reports

    found = read_recipe(recipe, overrides or [])
    space = Workspace(found, runs / found.name)
    check_reports(space.reports)
    return space


@contextmanager
def alone_in(recipe: Path, overrides: list[str] | None, runs: Path) -> Iterator[Any]:
    """The paths of a recipe's run, in which no other process works while the body runs."""
    from caliport.core.outputs import within_run
    from caliport.core.processes import alone, is_main

    space = space_of(recipe, overrides, runs)
    lock = alone(space.root, inside=True) if is_main() else nullcontext()
    with lock, within_run(space.root):
        yield space


def needed(**flags: Any) -> tuple[Any, ...]:
    """The values of flags; one that is missing is an error."""
    for name, value in flags.items():
        if value is None or value == []:
            raise InputError(f"--{name} is missing; use it, or a recipe (see --help)")
    return tuple(flags.values())


def no_flags(**flags: Any) -> None:
    """Refuse flags that do not go with a recipe."""
    for name, value in flags.items():
        if value:
            raise InputError(f"--{name} does not go with a recipe; use --set FIELD=VALUE")
