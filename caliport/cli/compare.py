"""Commands that compare: runs (``baseline``, ``compare``) and artifacts (``bench``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from caliport.cli.options import BaselineOption, DeviceOption, LlamaMainOption, RunnerOption
from caliport.core.errors import InputError

if TYPE_CHECKING:
    from caliport.validation.baseline.baseline import BaselineArtifact
    from caliport.validation.report.compare import Comparison, Pair

_DEVICE_THREADS = 4  # the fast cores of most phones

baselines = typer.Typer(
    help="Stored results that later runs are compared with: caliport validate --baseline FILE.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run or its reports directory.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(baselines, name="baseline")
    app.command()(compare)
    app.command()(bench)


@baselines.command()
def store(
    run: RunDir,
    place: Annotated[
        Path,
        typer.Argument(
            metavar="FILE_OR_DIR",
            help="A .json file, or a directory with one file for each machine.",
        ),
    ],
) -> None:
    """Store what a run reached: accuracy, sizes, memory, and speed as ratios."""
    from caliport.validation.baseline.baseline import baseline_of, reports_of, write_baseline

    baseline = baseline_of(reports_of(run))
    print(f"baseline: {write_baseline(baseline, place)}")
    unknown = [
        name
        for name, artifact in baseline.artifacts.items()
        if not name.endswith(" fp32") and not (artifact.speed and artifact.speed.relative)
    ]
    if unknown:
        print(f"speed is not held: no fp32 artifact, or too noisy: {', '.join(unknown)}")


@baselines.command()
def show(
    place: Annotated[Path, typer.Argument(metavar="FILE_OR_DIR", help="A stored baseline.")],
) -> None:
    """Show a stored baseline and whether it was made on a machine and versions like these."""
    from rich.text import Text

    from caliport.core.progress import PlainConsole
    from caliport.show.tables import table_of
    from caliport.validation.baseline.baseline import read_baseline
    from caliport.validation.baseline.regression import differences
    from caliport.validation.records.reports import environment, this_machine

    path, baseline = read_baseline(place, this_machine())
    machine = baseline.machine
    console = PlainConsole()
    console.print(Text(f"{path}: {machine.cpu}, {machine.cores} cores, {machine.os}"))
    if baseline.device is not None:
        device = baseline.device
        console.print(Text(f"timed on {device.cpu}, {device.cores} cores, {device.os}"))
    for line in differences(machine, baseline.versions, this_machine(), environment()):
        console.print(Text(line, "yellow"))
    for name, composition in baseline.compositions.items():
        loss = "" if composition.loss is None else f", loss {composition.loss:.4f}"
        console.print(Text(f"{name}: {composition.method}{loss}"))
    names = {name: name.rpartition(": ") for name in baseline.artifacts}
    for title in dict.fromkeys(parts[0] for parts in names.values()):
        heads = ("artifact", "task", "KL", "top-1", "MB", "peak MB", "× fp32", "bandwidth")
        table = table_of(title, heads)
        for name, parts in names.items():
            if parts[0] == title:
                table.add_row(parts[2], *_cells(baseline.artifacts[name]))
        console.print(table)


def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The earlier run.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The later run.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The HTML page; default compare.html among the later run's reports."
        ),
    ] = None,
) -> None:
    """Put two runs side by side, in the terminal and as an HTML page."""
    from caliport.validation.baseline.baseline import reports_of
    from caliport.validation.report.compare import PAGE, compare_runs, write_page

    comparison = compare_runs(first, second)
    page = out or reports_of(second) / PAGE
    write_page(comparison, page)
    show_comparison(comparison)
    print(f"page: {page}")


def show_comparison(comparison: Comparison) -> None:
    """Verdicts, what differs around the runs, and every figure and gate that is not the same."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from caliport.core.progress import PlainConsole

    console = PlainConsole()
    for name, found in zip(comparison.names, comparison.headlines, strict=True):
        colour = {"pass": "green", "fail": "red"}.get(found.state, "yellow")
        console.print(Text.assemble(f"{name}: ", (found.title, f"bold {colour}"), f" {found.text}"))
    for label, before, after in comparison.differences:
        console.print(Text(f"{label}: {before} → {after}"))
    for warning in comparison.warnings:
        console.print(Text(warning, "yellow"))
    rows = [*comparison.methods, *comparison.artifacts]
    if not any(_changed(pair) for pair in rows):
        console.print("Nothing else differs.")
        return
    for pair in filter(_changed, rows):
        table = Table(title=pair.name, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for head in ("", *comparison.names, "change"):
            table.add_column(head)
        for cells, style in _rows(pair):
            table.add_row(*map(Text, cells), style=style)
        console.print(table)
        for gate, before, after, reason in pair.gates:
            console.print(Text(f"{gate}: {before} → {after}: {reason}"))


def _changed(pair: Pair) -> bool:
    return bool(pair.changed or pair.gates) or pair.verdicts[0] != pair.verdicts[1]


def _rows(pair: Pair) -> list[tuple[tuple[str, str, str, str], str | None]]:
    """The cells of a pair's rows and their style: its verdict, then each figure that differs."""
    from caliport.validation.report.compare_figures import TONES

    rows: list[tuple[tuple[str, str, str, str], str | None]] = []
    if pair.verdicts[0] != pair.verdicts[1]:
        rows.append((("verdict", *pair.verdicts, ""), "bold"))
    for figure in pair.changed:
        cells = (figure.label, figure.before, figure.after, f"{figure.change} {TONES[figure.tone]}")
        style = {"better": "green", "worse": "red"}.get(figure.tone)
        rows.append((cells, style))
    return rows


def _cells(artifact: BaselineArtifact) -> tuple[str, ...]:
    speed = artifact.speed
    over = speed.relative if speed else None
    share = speed.bandwidth_share if speed else None
    return (
        f"{artifact.task.mean:.2f}" if artifact.task else "",
        f"{artifact.kl:.1e}",
        f"{artifact.top1:.1%}",
        f"{artifact.bytes / 1e6:.1f}",
        "" if artifact.peak_bytes is None else f"{artifact.peak_bytes / 1e6:.1f}",
        f"{over.value:.2f}" if over else "",
        f"{share.value:.0%}" if share else "",
    )


def bench(
    artifacts: Annotated[
        list[Path], typer.Argument(metavar="ARTIFACT...", help="Artifact directories.")
    ],
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt in tokens.", min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=2)] = 32,
    repetitions: Annotated[int, typer.Option(help="Rounds; a 95 % interval needs 6.", min=1)] = 6,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the runtime; default all cores.", min=1)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write latency.json and the report here.")
    ] = None,
    device: DeviceOption = None,
    runner: RunnerOption = None,
    llama_main: LlamaMainOption = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            help="On a device: prompt length in tokens; repeatable; default 32, 128, 512."
        ),
    ] = None,
    core: Annotated[
        list[int] | None, typer.Option(help="On a device: run on this core only; repeatable.")
    ] = None,
    celsius: Annotated[
        float, typer.Option(help="On a device: hottest battery at which to start a turn, in °C.")
    ] = 35.0,
    cool: Annotated[
        float,
        typer.Option(help="On a device: longest wait for it to cool down, in seconds.", min=0),
    ] = 300.0,
    baseline: BaselineOption = None,
) -> None:
    """Measure artifacts side by side: load, first token, decode rate, memory.

    Nothing is judged, unless --device and --baseline are given: exit code 1 if memory or speed got
    worse.
    """
    from caliport.validation.latency.workload import Workload

    if device:
        from caliport.android_harness.setup import LENGTHS, DeviceSetup
        from caliport.on_devices.bench import bench_on
        from caliport.on_devices.where import Where, chosen

        workload = Workload(new_tokens, repetitions, threads or _DEVICE_THREADS)
        setup = DeviceSetup(
            lengths=tuple(length or LENGTHS),
            cores=tuple(core or ()),
            celsius=celsius,
            cool_seconds=cool,
        )
        where = Where(tuple(chosen(device)), runner or (), llama_main)
        passed = bench_on(artifacts, where, workload, setup, out, baseline)
        raise typer.Exit(0 if passed else 1)
    if any((runner, llama_main, length, core, baseline)):
        raise InputError(
            "--runner, --llama-main, --length, --core and --baseline go with --device SERIAL"
        )
    from caliport.run.bench import bench as measure
    from caliport.validation.records.reports import this_machine

    workload = Workload(new_tokens, repetitions, threads or this_machine().cores)
    measure(artifacts, prompt_tokens, workload, out)
