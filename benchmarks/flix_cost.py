"""The cost of a FLix training step depends on its active features only, not on the others.

    python -m benchmarks.flix_cost

Trains two active features with 0, 8 and 64 inactive ones, in turns on one model, and prints the
median time of a step and its ratio to that without inactive features.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from caliport.calibrate.training.batches import Encoded
from caliport.calibrate.training.flix import FeatureSet, FeatureSettings, train_features
from caliport.calibrate.training.loop import TrainRun, TrainSettings

LENGTH, TARGET = 64, 16


def main(
    hidden: Annotated[int, typer.Option(help="Width of the model.")] = 256,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 4,
    rank: Annotated[int, typer.Option(help="Rank of each feature.")] = 8,
    batch: Annotated[int, typer.Option(help="Examples per step.")] = 8,
    steps: Annotated[int, typer.Option(help="Timed steps per turn.")] = 8,
    turns: Annotated[int, typer.Option(help="Turns; the order of a turn is shuffled.")] = 5,
) -> None:
    """Time a step with 0, 8 and 64 inactive features beside two active ones."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    draw = random.Random(0)
    examples = [
        Encoded(
            tuple(draw.randrange(5, 2000) for _ in range(LENGTH)),
            tuple(draw.randrange(5, 2000) for _ in range(TARGET)),
        )
        for _ in range(4 * batch)
    ]
    times: dict[int, list[float]] = {inactive: [] for inactive in (0, 8, 64)}
    for _ in range(turns):
        for inactive in draw.sample(list(times), len(times)):
            times[inactive].append(_step(model, examples, inactive, rank, batch, steps))
    table = Table("inactive features", "ms a step (median)", "ratio")
    alone = statistics.median(times[0])
    for inactive, found in times.items():
        median = statistics.median(found)
        table.add_row(str(inactive), f"{1000 * median:.1f}", f"{median / alone:.3f}")
    Console().print(table)


def _step(
    model: LlamaForCausalLM,
    examples: list[Encoded],
    inactive: int,
    rank: int,
    batch: int,
    steps: int,
) -> float:
    """Seconds a step: a longer training less a short one, so that building is not counted."""
    names = [f"inactive{i}" for i in range(inactive)]
    sets = [FeatureSet(("task", "language"), examples)]
    if names:  # they have a data set of their own, which no batch of the timed steps comes from
        sets.append(FeatureSet(tuple(names), []))
    ranks = dict.fromkeys(["task", "language", *names], rank)
    spent = []
    for count in (2, 2 + steps):
        settings = TrainSettings(steps=count, batch_size=batch, warmup=0.0)
        run = TrainRun(settings, "timing")
        start = time.perf_counter()
        train_features(model, sets, FeatureSettings(ranks, dropout=0.0), run)
        spent.append(time.perf_counter() - start)
    return (spent[1] - spent[0]) / steps


if __name__ == "__main__":
    typer.run(main)
