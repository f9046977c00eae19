"""KL, favourite tokens and perplexity of int4 on a real chat model, by quantizer and by tool.

    python -m benchmarks.real fetch
    python -m benchmarks.quantization setup
    python -m benchmarks.quantization run --base MODEL --data ../shared/data --out runs/quantization
    python -m benchmarks.quantization rates --out runs/quantization

Every row is an artifact: exported by a command in a process of its own, then read back. "KL" is of
the artifact's own weights in float arithmetic, without rounded activations, over all texts; "in the
runtime" of the logits that its runtime gives token by token, on some of the dialogues. Both are
compared with the float32 model. Calibration text is DialogSum's dev set, measured are its test set
and WikiText-2's. Finished parts are kept, so the same command resumes a killed run. ``rates`` needs
an idle machine. Either writes the tables and the plot.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.document import put
from benchmarks.export.turns import Course
from benchmarks.quantization import rates as rating
from benchmarks.quantization.measuring import Amount, Meter
from benchmarks.quantization.peers import TOOLS, Request, install, interpreter
from benchmarks.quantization.plot import draw
from benchmarks.quantization.records import read, write
from benchmarks.quantization.rows import ROWS
from benchmarks.quantization.running import complete
from benchmarks.quantization.table import render
from benchmarks.quantization.texts import calibration
from caliport.core.errors import InputError, one_line

PEERS = Path("runs/peers")
PICTURE = "int4.png"

_HELP = (__doc__ or "").partition("\n")[0]
app = typer.Typer(add_completion=False, no_args_is_help=True, help=_HELP)
console = Console()

Out = Annotated[Path, typer.Option(help="Directory for artifacts and results.")]
Only = Annotated[list[str] | None, typer.Option("--only", help="A row; repeatable.")]
Peers = Annotated[Path, typer.Option(help="Directory of the tools' environments.")]
Document = Annotated[
    Path, typer.Option("--results", help="Document that gets the tables; the plot lies beside it.")
]
Write = Annotated[
    bool, typer.Option("--write/--no-write", help="Put tables and plot into --results.")
]
_RESULTS = Path("docs/results.md")


@app.command()
def setup(
    only: Annotated[list[str] | None, typer.Option(help="A tool; repeatable.")] = None,
    peers: Peers = PEERS,
) -> None:
    """Create the tools' environments with pip; finished ones are kept.

    llama.cpp is compiled, which takes a long while.
    """
    for name in _known(only, list(TOOLS)):
        try:
            console.print(f"{name}: {'installed' if install(name, peers) else 'nothing to do'}")
        except InputError as error:
            console.print(f"{name}: failed: {error}", markup=False)


@app.command()
def run(
    base: Annotated[Path, typer.Option(help="The model: a directory or a .gguf file.")],
    data: Annotated[Path, typer.Option(help="Directory with dialogsum/ and wikitext2/.")],
    out: Out,
    only: Only = None,
    count: Annotated[int, typer.Option(help="Dialogues and articles to measure, each.")] = 14,
    slice_: Annotated[int, typer.Option("--slice", help="Dialogues for the runtime.")] = 6,
    summaries: Annotated[int, typer.Option(help="Dialogues to summarize.")] = 40,
    tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 8192,
    again: Annotated[bool, typer.Option(help="Also repeat finished rows.")] = False,
    peers: Peers = PEERS,
    results: Document = _RESULTS,
    write_: Write = True,
) -> None:
    """Export and measure every row, and write the tables and the plot."""
    from caliport.core.model_files.gguf_base import as_directory

    names = _chosen(only)
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    text = calibration(data, out / "calibration.jsonl")
    base, checkpoint = base.resolve(), Path(as_directory(base)).resolve()
    meter = Meter(base, data, Amount(count, slice_, summaries))
    failed = []
    for name in names:
        record, row = out / f"{name}.json", ROWS[name]
        if again:
            record.unlink(missing_ok=True)
        try:
            python = interpreter(row.tool, peers)
            places = (out / name, out / f"{name}.work")
            request = Request(row, base, checkpoint, text, tokens, *places, python)
            done = complete(request, record, meter, peers)
            console.print(f"{name}: {'measured' if done else 'kept'}")
        except InputError as error:
            failed.append(name)
            write(record, {**read(record), "failed": one_line(error)[-200:]})
            console.print(f"{name}: failed: {error}", markup=False)
    _show(out, results if write_ else None)
    if failed:
        raise InputError(f"failed: {', '.join(failed)}")


@app.command()
def rates(
    out: Out,
    only: Only = None,
    threads: Annotated[int, typer.Option(help="Threads of every artifact.")] = 2,
    prompt: Annotated[int, typer.Option(help="Prompt length in tokens.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds, of a turn for each artifact.")] = 15,
    peers: Peers = PEERS,
    results: Document = _RESULTS,
    write_: Write = True,
) -> None:
    """Measure prefill and decode rates in turns, on an idle machine, of the artifacts there are."""
    out = out.resolve()
    names = [name for name in _chosen(only) if "runtime" in read(out / f"{name}.json")]
    failed = rating.run(names, out, peers, Course(threads, prompt, new_tokens, rounds))
    for name, why in failed.items():
        console.print(f"{name}: cannot be run: {why}", markup=False)
    _show(out, results if write_ else None)


@app.command()
def tables(out: Out, results: Document = _RESULTS) -> None:
    """Write the tables and the plot of a run."""
    _show(out, results)


def _chosen(only: list[str] | None) -> list[str]:
    return _known(only, list(ROWS))


def _known(only: list[str] | None, names: list[str]) -> list[str]:
    odd = [name for name in only or () if name not in names]
    if odd:
        raise typer.BadParameter(f"{odd[0]!r}; expected one of {', '.join(names)}")
    return [name for name in names if not only or name in only]


def _show(out: Path, document: Path | None) -> None:
    """Print the tables; put them and the plot where the document is."""
    table = render(out)
    console.print(Markdown(table))
    if document is not None:
        picture = document.with_name(PICTURE)
        if draw(out, picture):
            table += f"\n\n![KL against bytes]({picture.name})"
        put("quantization", table, document)


if __name__ == "__main__":
    try:
        app()
    except InputError as error:
        sys.exit(f"benchmark: {error}")
