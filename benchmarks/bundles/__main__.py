"""Compare two ways to bundle compositions for ExecuTorch: one method each, or inputs.

    python -m benchmarks.bundles run --scale 1b --out runs/bundles

makes random adapters and fourteen LC++ compositions, with and without merged adapters, exports one
folded artifact and a bundle of each family in each way, and measures them in turns. Finished
exports are kept, so the same command resumes a killed run (``--again`` exports everything again).
``--scale tiny`` takes a minute or two.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.bundles.adapters import COMPOSITIONS, FAMILIES, write_adapters
from benchmarks.bundles.exporting import ARTIFACTS, FOLDED, SHOWN, export, parts_of
from benchmarks.bundles.records import Results
from benchmarks.bundles.speed import PROGRAM
from benchmarks.bundles.tables import render
from benchmarks.bundles.turns import run as run_family
from benchmarks.document import put
from benchmarks.export.checkpoint import SHAPES, write_checkpoint
from benchmarks.export.records import RESULTS, write_record
from benchmarks.export.turns import Course
from caliport.core.directories import read_manifest, versions
from caliport.core.errors import InputError
from caliport.validation.records.reports import this_machine

_HELP = (__doc__ or "").partition("\n")[0]
app = typer.Typer(add_completion=False, no_args_is_help=True, help=_HELP)
console = Console()

Document = Annotated[Path, typer.Option("--results", help="Document that gets the tables.")]
Pairs = Annotated[list[str], typer.Option(metavar="NAME=DIR")]


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Directory for artifacts and results.")],
    scale: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "1b",
    checkpoint: Annotated[Path | None, typer.Option(help="Default runs/llama-SCALE.")] = None,
    compositions: Annotated[int, typer.Option(help="Number in a bundle.")] = len(COMPOSITIONS),
    used: Annotated[int, typer.Option(help="Number of compositions to run.")] = 3,
    again: Annotated[bool, typer.Option(help="Also repeat finished exports.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of exports and artifacts.")] = 2,
    context: Annotated[int, typer.Option(help="Cache length in tokens.")] = 2048,
    prompt: Annotated[int, typer.Option(help="Prompt length in tokens.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds of measurement.")] = 5,
    results: Document = Path("docs/results.md"),
    write: Annotated[bool, typer.Option(help="Put the tables into --results.")] = True,
) -> None:
    """Export the artifacts, run them, and write the tables."""
    if scale not in SHAPES:
        raise typer.BadParameter(f"{scale!r}; expected one of {', '.join(SHAPES)}")
    if not 2 <= used <= compositions <= len(COMPOSITIONS):
        raise typer.BadParameter(f"expected 2 <= used <= compositions <= {len(COMPOSITIONS)}")
    base = checkpoint or Path(f"runs/llama-{scale}")
    if not base.exists():
        write_checkpoint(SHAPES[scale], base)
    names = list(COMPOSITIONS)[:compositions]
    out.mkdir(parents=True, exist_ok=True)
    adapters = out / "made"
    if not _is_made(adapters, names):
        shutil.rmtree(adapters, ignore_errors=True)
        write_adapters(base, adapters, names)
    exports = {}
    for artifact in ARTIFACTS:
        if again:
            (out / f"{artifact}.json").unlink(missing_ok=True)
        made = export(artifact, base, adapters, names, out, context, threads)
        exports[artifact] = made
        size = sum(made.files.values()) / 1e6
        took = f"{made.seconds:.0f} s, {made.peak_bytes / 1e9:.1f} GB, {size:.0f} MB"
        console.print(f"{artifact}: {took}")
    course = Course(threads, prompt, new_tokens, rounds)
    found = {family: run_family(family, out, names[:used], course) for family in FAMILIES}
    here = versions()
    folded = exports[FOLDED].files[PROGRAM]
    record = Results(
        machine=this_machine(),
        parameters=read_manifest(base)["parameters"],
        context=context,
        prompt_tokens=prompt,
        new_tokens=new_tokens,
        threads=threads,
        compositions=compositions,
        versions={name: here[name] for name in SHOWN},
        exports=exports,
        parts={artifact: parts_of(artifact, out, folded) for artifact in ARTIFACTS},
        ways={family: ways for family, (ways, _) in found.items()},
        parity={family: parity for family, (_, parity) in found.items()},
    )
    write_record(record, out / RESULTS)
    _show(record, results if write else None)


@app.command()
def tables(
    out: Annotated[Path, typer.Option(help="The directory of a run.")],
    results: Document = Path("docs/results.md"),
    write: Annotated[bool, typer.Option(help="Put the tables into --results.")] = True,
) -> None:
    """Write the tables of a finished run."""
    try:
        record = Results.model_validate_json((out / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise InputError(f"{out / RESULTS}: not results of this benchmark ({error})") from None
    _show(record, results if write else None)


@app.command()
def inputs(
    base: Annotated[Path, typer.Option()],
    bundle: Pairs,
    out: Annotated[Path, typer.Option()],
    share: Annotated[list[str] | None, typer.Option(metavar="NAME=DIR")] = None,
    precision: Annotated[str, typer.Option()] = "int4",
    context: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Export a bundle whose one method takes adapters as inputs."""
    from benchmarks.bundles.inputs import to_inputs

    to_inputs(
        base,
        _named(bundle),
        out,
        adapters=_named(share or []),
        precision=precision,
        context=context,
    )


def _named(pairs: list[str]) -> dict[str, Path]:
    return {name: Path(path) for name, _, path in (pair.partition("=") for pair in pairs)}


def _is_made(adapters: Path, names: list[str]) -> bool:
    return adapters.exists() and read_manifest(adapters)["settings"]["compositions"] == names


def _show(record: Results, document: Path | None) -> None:
    text = render(record)
    console.print(Markdown(text))
    if document is not None:
        put("bundles", text, document)
        console.print(f"tables: {document}")


if __name__ == "__main__":
    try:
        app()
    except InputError as error:
        sys.exit(f"benchmark: {error}")
