"""The tables of a benchmark, as Markdown between two marks in docs/results.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.composition.plans import TRAINED, Plan, fields_of, has
from benchmarks.document import markdown, put
from caliport.core.directories import read_manifest
from caliport.recipe.methods import KINDS, parse
from caliport.run.resolve import FP32, read_score, reported, variants_of
from caliport.run.workspace import Workspace
from caliport.stages.sweep import seconds_of
from caliport.validation.evaluation.bootstrap import clustered_interval
from caliport.validation.records.reports import this_machine

CONFIDENCE = 0.95


def write_tables(
    name: str,
    plan: Plan,
    spaces: Sequence[Workspace],
    rates: Mapping[str, float],
    path: Path,
) -> None:
    """Replace the text between this benchmark's marks; the rest of the file is unchanged.

    Raises:
        InputError: The file has no such marks.
    """
    put(name, "\n\n".join(_tables(plan, spaces, rates)), path)


def _tables(plan: Plan, spaces: Sequence[Workspace], rates: Mapping[str, float]) -> Iterable[str]:
    machine = this_machine()
    first = spaces[0]
    metric = first.recipe.evaluation.metric
    examples = first.recipe.evaluation.examples or "all"
    yield (
        f"Seeds: {len(spaces)}. {examples} validation examples a composition, {metric} from 0 to "
        f"100. {machine.cpu}, {machine.cores} cores, one thread each; the stages' own times add up "
        f"to {_stage_seconds(spaces) / 60:.0f} minutes."
    )
    yield "Learning rates: loss on held-out training examples of each rate tried (best in bold)."
    yield _sweep_table(plan, first, rates)
    yield f"{metric} of greedy answers, mean ± standard deviation over seeds."
    yield _by_group(plan, spaces, lambda s, c, m: read_score(s, c, m)[metric], "{:.1f}")
    yield "Loss in nats a token."
    yield _by_group(plan, spaces, lambda s, c, m: read_score(s, c, m)["loss"], "{:.3f}")
    yield (
        "Share of the gap from the linear merge to the joint expert that a method closes (mean "
        "over compositions and seeds), and what it costs: values trained and seconds to make one."
    )
    yield _gap_table(plan, spaces, metric)
    yield from _quantization(plan, spaces, metric)
    if first.recipe.flix is not None:
        yield from _unseen(plan, spaces, metric)


def _by_group(
    plan: Plan,
    spaces: Sequence[Workspace],
    read: Callable[[Workspace, str, str], float | None],
    form: str,
) -> str:
    groups = plan.groups
    rows = []
    for method in _order(plan):
        row = [parse(method).label]
        for compositions in groups.values():
            by_seed = []
            for seed, space in enumerate(spaces):
                here = [c for c in compositions if has(plan, c, seed, method)]
                if not all(_scored(plan, space, c, seed, method) for c in here):
                    continue  # a mean over a part of a group would not be that of the others
                found = [read(space, c, method) for c in here]
                known = [value for value in found if value is not None]
                if known:
                    by_seed.append(statistics.mean(known))
            row.append(_spread(by_seed, form))
        if any(row[1:]):
            rows.append(row)
    return markdown(["method", *groups], rows)


def _gap_table(plan: Plan, spaces: Sequence[Workspace], metric: str) -> str:
    rows = []
    for method in _order(plan):
        if not parse(method).composed:
            continue
        shares: dict[str, list[float]] = {"loss": [], metric: []}
        seconds, values = [], []
        for space, composition in _cells(plan, spaces, method, "linear", "joint"):
            for key, share in shares.items():
                closed = _share(space, composition, method, key)
                if closed is not None:
                    share.append(closed)
            manifest = read_manifest(space.composed(composition, method))
            seconds.append(seconds_of(manifest))
            values.append(manifest.get("parameters", 0))
        if not seconds:
            continue
        rows.append(
            [
                parse(method).label,
                *(_spread([100 * x for x in found], "{:.0f} %") for found in shares.values()),
                f"{statistics.mean(values):,.0f}",
                f"{statistics.mean(seconds):.0f}",
            ]
        )
    return markdown(["method", "loss", metric, "values", "seconds"], rows)


def _share(space: Workspace, composition: str, method: str, key: str) -> float | None:
    """Share of the gap from linear to joint that is closed; None if there is no gap."""
    linear, joint, found = (
        read_score(space, composition, m)[key] for m in ("linear", "joint", method)
    )
    return float((found - linear) / (joint - linear)) if joint != linear else None


def _quantization(plan: Plan, spaces: Sequence[Workspace], metric: str) -> Iterable[str]:
    yield "What merging cost and what quantization cost: loss and score by the weights that ship."
    pairs = [("linear", FP32)]
    for method in dict.fromkeys(m for ms in plan.quantized.values() for m in ms):
        pairs += [(method, v) for v in variants_of(spaces[0], method)]
    rows = []
    for method, variant in dict.fromkeys(pairs):
        cells = _cells(plan, spaces, method, "linear")
        if not cells:
            continue
        scores = [read_score(s, c, method, variant) for s, c in cells]
        rows.append(
            [
                parse(method).label,
                variant,
                str(len(cells)),
                f"{statistics.mean(s['loss'] for s in scores):.4f}",
                f"{statistics.mean(s[metric] for s in scores):.2f}",
            ]
        )
    yield markdown(["method", "weights", "runs", "loss", metric], rows)
    compared = [
        ("lc++", "int4", "lc++", FP32),
        ("lc++-int4", "int4", "lc++", FP32),
        ("lc++-int4", "int4", "lc++", "int4"),
        ("lc++-int4-bundle", "int4-bundle", "lc++", FP32),
        ("lc++-int4-bundle", "int4-bundle", "lc++", "int4-bundle"),
    ]
    yield (
        f"Paired over examples, all compositions and seeds together, with the {CONFIDENCE:.0%} "
        "interval of the difference by cluster bootstrap over seeds and images or chats (loss: "
        "below 0 is better; score: above 0)."
    )
    rows = [
        [
            f"{m} in {v}",
            f"{n} in {w}",
            _paired(_cells(plan, spaces, m, n), (m, v), (n, w), "loss", "{:+.4f}"),
            _paired(_cells(plan, spaces, m, n), (m, v), (n, w), metric, "{:+.2f}"),
        ]
        for m, v, n, w in compared
        if _cells(plan, spaces, m, n)
    ]
    yield markdown(["this", "against", "loss", metric], rows)


def _unseen(plan: Plan, spaces: Sequence[Workspace], metric: str) -> Iterable[str]:
    yield (
        "FLix against one LoRA of the same active rank on the same mixture and steps: mean score, "
        f"and the {CONFIDENCE:.0%} interval of the paired difference by cluster bootstrap over "
        "seeds and images or chats."
    )
    flix = spaces[0].recipe.flix
    assert flix is not None
    rows = []
    for composition in spaces[0].recipe.compositions:
        cells = [x for x in _cells(plan, spaces, "mixture", "flix") if x[1] == composition]
        if not cells:
            continue
        row = [composition, "trained" if composition in flix.train_on else "never trained"]
        for method in ("mixture", "flix"):
            found = [read_score(space, composition, method) for space, _ in cells]
            row.append(_spread([f[metric] for f in found], "{:.1f}"))
            row.append(_spread([f["loss"] for f in found], "{:.3f}"))
        row.append(_paired(cells, ("flix", FP32), ("mixture", FP32), metric, "{:+.2f}"))
        rows.append(row)
    heads = ["composition", "pair", f"LoRA {metric}", "LoRA loss", f"FLix {metric}", "FLix loss"]
    yield markdown([*heads, f"{metric} difference"], rows)


def _paired(
    cells: Sequence[tuple[Workspace, str]],
    one: tuple[str, str],
    other: tuple[str, str],
    key: str,
    form: str,
) -> str:
    differences, seeds, items = [], [], []
    for space, composition in cells:
        scores = [read_score(space, composition, *way)["examples"][key] for way in (one, other)]
        differences += np.subtract(*scores).tolist()
        seeds += [space.recipe.seed] * len(scores[0])
        items += _items(space, composition)
    low, high = clustered_interval(np.array(differences), seeds, items, CONFIDENCE)
    return f"{form.format(np.mean(differences))} [{form.format(low)}, {form.format(high)}]"


def _items(space: Workspace, composition: str) -> list[str]:
    """The image or chat of each example: its input, whatever order its lines are in."""
    examples = reported(space, composition, space.recipe.evaluation.examples)
    return ["\n".join(sorted(example.input.split("\n"))) for example in examples]


def _sweep_table(plan: Plan, first: Workspace, rates: Mapping[str, float]) -> str:
    root = first.root.parent / f"{first.recipe.name}-sweep"
    rows = []
    for method in TRAINED:
        manifest = read_manifest(root / "composed" / plan.sweep_on / method)
        best = rates[fields_of(method)]
        cells = [
            f"**{t['learning_rate']:g}: {t['loss']:.3f}**"
            if t["learning_rate"] == best
            else f"{t['learning_rate']:g}: {t['loss']:.3f}"
            for t in manifest["sweep"]
        ]
        rows.append([parse(method).label, *cells])
    most = max(len(row) for row in rows)
    return markdown(["method", *[""] * (most - 1)], rows)


def _order(plan: Plan) -> list[str]:
    """The plan's methods by kind: without training, merges, corrections, trained adapters."""
    methods = (*plan.core, *plan.others, *plan.merges, *plan.more)
    return sorted(methods, key=lambda m: KINDS.index(parse(m).kind))


def _cells(plan: Plan, spaces: Sequence[Workspace], *methods: str) -> list[tuple[Workspace, str]]:
    """Seeds and compositions that have all of these methods."""
    return [
        (space, composition)
        for seed, space in enumerate(spaces)
        for composition in space.recipe.compositions
        if all(_scored(plan, space, composition, seed, method) for method in methods)
    ]


def _scored(plan: Plan, space: Workspace, composition: str, seed: int, method: str) -> bool:
    """Whether the benchmark includes this and has scored it."""
    kept = [
        space.kept("scores", composition, method, v) / "score.json"
        for v in variants_of(space, method)
    ]
    return has(plan, composition, seed, method) and all(path.exists() for path in kept)


def _stage_seconds(spaces: Sequence[Workspace]) -> float:
    manifests = {path for space in spaces for path in space.root.rglob("manifest.json")} | set(
        (spaces[0].root.parent / f"{spaces[0].recipe.name}-sweep").rglob("manifest.json")
    )
    return sum(float(read_manifest(path.parent).get("seconds", 0)) for path in manifests)


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean
