"""Compare caliport's exports of a Llama of the 1B shape with other exporters ("peers").

    python -m benchmarks.export setup
    python -m benchmarks.export checkpoint --out runs/llama-1b
    python -m benchmarks.export run --checkpoint runs/llama-1b --out runs/export-benchmark

Every exporter runs as the command in its own documentation, in its own environment, one after the
other. Finished exports are kept, so the same command resumes a killed run (also after changes to
caliport's code: ``--again --only caliport-onnx`` exports again); the speed of all artifacts is
measured in turns every time. ``--scale tiny`` makes a checkpoint with which all of this takes
minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.export.checkpoint import SHAPES, write_checkpoint
from benchmarks.export.environments import check_installed, install
from benchmarks.export.exporters import EXPORTERS
from benchmarks.export.exporting import export
from benchmarks.export.records import RESULTS, Results, read_export, read_results, write_record
from benchmarks.export.tables import render, write_tables
from benchmarks.export.turns import Course, speeds
from caliport.core.directories import read_manifest, versions
from caliport.core.errors import InputError
from caliport.validation.records.reports import this_machine

PEERS = Path("runs/peers")

_HELP = (__doc__ or "").partition("\n")[0]
app = typer.Typer(add_completion=False, no_args_is_help=True, help=_HELP)
console = Console()

Only = Annotated[list[str] | None, typer.Option("--only", help="An exporter; repeatable.")]
Peers = Annotated[Path, typer.Option(help="Directory of the peers' environments.")]
Document = Annotated[Path, typer.Option("--results", help="Document that gets the tables.")]


@app.command()
def checkpoint(
    out: Annotated[Path, typer.Option(help="The directory to write.")],
    scale: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "1b",
    seed: Annotated[int, typer.Option(help="Seed of weights and tokenizer.")] = 0,
) -> None:
    """Write a Llama-3.2-1B-shaped checkpoint with random weights."""
    if scale not in SHAPES:
        raise typer.BadParameter(f"{scale!r}; expected one of {', '.join(SHAPES)}")
    parameters = write_checkpoint(SHAPES[scale], out, seed)
    console.print(f"{out}: {parameters:,} parameters")


@app.command()
def setup(only: Only = None, peers: Peers = PEERS) -> None:
    """Create the peers' virtual environments with pip; finished ones are kept."""
    for name in _chosen(only):
        console.print(f"{name}: {'installed' if install(name, peers) else 'nothing to do'}")


@app.command()
def run(
    checkpoint: Annotated[Path, typer.Option(help="A directory from `checkpoint`.")],
    out: Annotated[Path, typer.Option(help="Directory for artifacts and results.")],
    only: Only = None,
    again: Annotated[bool, typer.Option(help="Also repeat finished exports.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of exports and artifacts.")] = 2,
    context: Annotated[int, typer.Option(help="Cache length in tokens.")] = 2048,
    prompt: Annotated[int, typer.Option(help="Prompt length in tokens.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds of measurement.")] = 7,
    peers: Peers = PEERS,
    results: Document = Path("docs/results.md"),
    write: Annotated[bool, typer.Option(help="Put the tables into --results.")] = True,
) -> None:
    """Export with every exporter, run the artifacts, and write the tables."""
    names = _chosen(only)
    check_installed(names, peers)
    manifest = read_manifest(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        if again:
            (out / f"{name}.json").unlink(missing_ok=True)
        try:
            made, new = export(name, checkpoint, out, context, threads, peers)
        except InputError as error:
            failed.append(name)
            console.print(f"{name}: failed: {error}", markup=False)
            continue
        took = f"{made.seconds:.0f} s, {made.peak_bytes / 1e9:.1f} GB"
        console.print(f"{name}: {took if new else f'kept ({took})'}")
    found = {name: read_export(out / f"{name}.json") for name in EXPORTERS}
    same = (manifest["key"], context, threads)
    exports = {
        name: made
        for name, made in found.items()
        if made and (made.checkpoint, made.context, made.threads) == same
    }
    course = Course(threads, prompt, new_tokens, rounds)
    measured, unfit = speeds(list(exports), checkpoint, out, course)
    for name, problem in unfit.items():
        failed.append(name)
        console.print(f"{name}: cannot be run: {problem}", markup=False)
    here = versions()
    record = Results(
        machine=this_machine(),
        parameters=manifest["parameters"],
        context=context,
        prompt_tokens=prompt,
        new_tokens=new_tokens,
        threads=threads,
        versions={name: here[name] for name in ("executorch", "onnxruntime-genai")},
        exports=exports,
        speeds=measured,
    )
    write_record(record, out / RESULTS)
    _show(record, results if write else None)
    if failed:
        raise InputError(f"failed: {', '.join(failed)}")


@app.command()
def tables(
    out: Annotated[Path, typer.Option(help="The directory of a run.")],
    results: Document = Path("docs/results.md"),
    write: Annotated[bool, typer.Option(help="Put the tables into --results.")] = True,
) -> None:
    """Write the tables of a finished run."""
    _show(read_results(out / RESULTS), results if write else None)


def _chosen(only: list[str] | None) -> list[str]:
    odd = [name for name in only or () if name not in EXPORTERS]
    if odd:
        raise typer.BadParameter(f"{odd[0]!r}; expected one of {', '.join(EXPORTERS)}")
    return [name for name in EXPORTERS if not only or name in only]


def _show(record: Results, document: Path | None) -> None:
    """Print the tables and put them into the document."""
    console.print(Markdown(render(record)))
    if document is not None:
        write_tables(record, document)
        console.print(f"tables: {document}")


if __name__ == "__main__":
    try:
        app()
    except InputError as error:
        sys.exit(f"benchmark: {error}")
