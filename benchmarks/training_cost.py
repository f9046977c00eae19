"""Time and memory of a training step of LC and LC++, compared with the joint expert's LoRA.

    python -m benchmarks.training_cost

Every method trains in its own process, on the same examples and a Llama-shaped model with random
weights; the processes take turns, in a new order each round. Prints the median time of a step and
the peak of resident memory above the loaded model (what the method adds, adapters included), with
ratios to the joint expert's. Linux only: other systems do not report the peak.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.children import child

METHODS = {"joint": "joint LoRA (PEFT)", "lc": "LC", "lc++": "LC++"}
_WARM_UP = 1


def main(
    hidden: Annotated[int, typer.Option(help="Width of the model.")] = 256,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 6,
    vocab: Annotated[int, typer.Option(help="Vocabulary size.")] = 4096,
    length: Annotated[int, typer.Option(help="Tokens per example; a quarter are targets.")] = 96,
    batch: Annotated[int, typer.Option(help="Examples per step.")] = 8,
    micro_batch: Annotated[
        int, typer.Option(help="Most examples in one forward pass; 0: all.")
    ] = 0,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA and of both merged adapters.")] = 32,
    dropout: Annotated[float, typer.Option(help="Dropout of the LoRA's input.")] = 0.0,
    steps: Annotated[int, typer.Option(help="Timed steps per turn.")] = 3,
    turns: Annotated[int, typer.Option(help="Turns of each method.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of each process.")] = 1,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Train each method for a few steps in turns and print time and memory."""
    shape = {"hidden": hidden, "layers": layers, "vocab": vocab, "rank": rank, "dropout": dropout}
    shape |= {"length": length, "batch": batch, "micro_batch": micro_batch, "steps": steps}
    if worker is not None:
        _work(worker, shape)
        return
    workers = {method: _started(method, threads) for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    bytes_over: dict[str, int] = {}
    try:
        draw = random.Random(0)
        for _ in range(turns):
            for method in draw.sample(list(METHODS), len(METHODS)):
                found = _turn(workers[method])
                seconds[method] += found["seconds"]
                bytes_over[method] = found["peak"]
    finally:
        for process in workers.values():
            process.kill()
    medians = {method: statistics.median(found) for method, found in seconds.items()}
    table = Table("", "ms a step", "ratio", "peak memory over the model, MiB", "ratio")
    for method, title in METHODS.items():
        table.add_row(
            title,
            f"{medians[method] * 1e3:.0f}",
            f"{medians[method] / medians['joint']:.2f}",
            f"{bytes_over[method] / 2**20:.0f}",
            f"{bytes_over[method] / bytes_over['joint']:.2f}",
        )
    Console().print(table)


def _started(method: str, threads: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*child("benchmarks.training_cost"), *sys.argv[1:], "--worker", method],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _turn(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    found: dict[str, Any] = json.loads(process.stdout.readline())
    return found


def _work(method: str, shape: dict[str, Any]) -> None:
    """Train once for every line that comes, and answer with the steps' seconds and the peak."""
    import accelerate  # noqa: F401  # all code is loaded before memory is counted
    import peft  # noqa: F401
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import caliport.calibrate.corrections.train
    import caliport.calibrate.training.lora  # noqa: F401

    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["hidden"] * 11 // 4,
        num_hidden_layers=shape["layers"],
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float()
    starts: list[float] = []
    forward = model.forward

    def timed(*arguments: Any, **named: Any) -> Any:
        starts.append(time.perf_counter())
        return forward(*arguments, **named)

    model.forward = timed
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    loaded = _resident("VmRSS")
    train = _training(method, model, shape)
    parts = -(-shape["batch"] // (shape["micro_batch"] or shape["batch"]))
    for _ in sys.stdin:
        starts.clear()
        train()
        begins = [*starts[::parts], time.perf_counter()][_WARM_UP:]
        seconds = [end - start for start, end in pairwise(begins)]
        print(json.dumps({"seconds": seconds, "peak": _resident("VmHWM") - loaded}), flush=True)


def _training(method: str, model: Any, shape: dict[str, Any]) -> Any:
    """What a turn does."""
    from caliport.calibrate.training.batches import Encoded
    from caliport.calibrate.training.loop import TrainRun, TrainSettings
    from caliport.calibrate.training.lora import LoraSettings, train_lora

    draw = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(5, shape["vocab"]) for _ in range(count))

    target = shape["length"] // 4
    examples = [
        Encoded(tokens(shape["length"] - target), tokens(target)) for _ in range(4 * shape["batch"])
    ]
    settings = TrainSettings(shape["steps"] + _WARM_UP, shape["batch"])
    run = TrainRun(settings, method, micro_batch=shape["micro_batch"] or None)
    if method == "joint":
        lora = LoraSettings(shape["rank"], shape["rank"] / 2, shape["dropout"])
        return lambda: train_lora(model, examples, lora, run)
    from caliport.calibrate.corrections.common import Composition
    from caliport.calibrate.corrections.train import calibrate
    from caliport.calibrate.merges.linear import linear

    adapters = {str(seed): _adapter(model, shape["rank"], seed) for seed in (1, 2)}
    composition = Composition(adapters, linear(list(adapters.values())))
    return lambda: calibrate(model, {"both": composition}, method, {"both": examples}, run)


def _adapter(model: Any, rank: int, seed: int) -> Any:
    import torch

    from caliport.calibrate import LowRankUpdate
    from caliport.calibrate.training.lora import COMPONENTS

    draw = torch.Generator().manual_seed(seed)
    weights = {
        name: module.weight
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in COMPONENTS
    }
    return LowRankUpdate(
        {n: torch.randn(rank, w.shape[1], generator=draw) / 100 for n, w in weights.items()},
        {n: torch.randn(w.shape[0], rank, generator=draw) / 100 for n, w in weights.items()},
    )


def _resident(field: str) -> int:
    """Resident memory in bytes: ``VmRSS`` now, ``VmHWM`` at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


if __name__ == "__main__":
    typer.run(main)
