"""``caliport calibrate`` without a recipe: one composition, or FLix features, from flags."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from caliport.calibrate.corrections.registry import CORRECTIONS
from caliport.core.errors import InputError, printable
from caliport.core.progress import console
from caliport.core.prompts import PLAIN
from caliport.core.untrusted import check_name, number, shown
from caliport.data.examples import read_jsonl
from caliport.recipe import bounds
from caliport.recipe.calibration import SEARCH
from caliport.recipe.methods import CORRECTED, MERGED, WEIGHTED, Method, dora_rank, parse
from caliport.stages.compose import FEW_SHOT, ComposeSettings, CompositionInputs, compose_to
from caliport.stages.sources import Source
from caliport.stages.train import Training, features_to

_FEWEST = 10  # examples of which a fifth can be held out


@dataclass(frozen=True)
class Steering:
    """How a merge is steered: alone, or under a correction.

    Attributes:
        merge: The merge under a correction; None: the default.
        weights: One per adapter, or ``search``; empty: equal.
        density: Share of values that TIES and DARE keep.
        targets: Layers that a correction reaches besides the adapters' own.
        any_base: Take adapters that name different bases, if their shapes fit.
    """

    merge: str | None = None
    weights: Sequence[float] | str = ()
    density: float | None = None
    targets: tuple[str, ...] = ()
    any_base: bool = False

    @classmethod
    def of(
        cls,
        merge: str | None,
        weights: Sequence[str],
        density: float | None,
        targets: Sequence[str],
    ) -> Steering:
        """From the flags' texts; ``InputError`` for a weight that is no number and not search."""
        if SEARCH in weights:
            if len(weights) > 1:
                raise InputError(f"--weight {SEARCH}: expected no other --weight beside it")
            return cls(merge, SEARCH, density, tuple(targets))
        return cls(merge, [_weight(text) for text in weights], density, tuple(targets))

    def check(self, method: Method, adapters: int) -> None:
        """Refuse what does not go with a method, a correction that has no merge for example."""
        kind, name = method.kind, method.name
        corrects = kind in CORRECTED and CORRECTIONS[kind].merges
        merges = corrects and not method.alone
        if self.merge is not None and self.merge not in MERGED:
            raise InputError(f"--merge {shown(self.merge)}: expected one of {', '.join(MERGED)}")
        if self.merge is not None and not merges:
            raise InputError(f"--merge: {name} has no merge under a correction; leave it out")
        if self.targets and not corrects:
            raise InputError(f"--target goes with a correction such as lc++; found {name}")
        if self.weights and kind in WEIGHTED:
            raise InputError(f"--weight: {name} finds its own")
        if self.weights and method.alone:
            raise InputError(f"--weight: {name} has no merge; leave it out")
        if self.weights and self.weights != SEARCH and len(self.weights) != adapters:
            raise InputError(
                f"found {len(self.weights)} --weight for {adapters} --adapter; expected one each"
            )


def _weight(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        raise InputError(f"--weight {shown(text)}: expected a number, or {SEARCH}") from None
    return float(number(found, "--weight", -bounds.WEIGHT, bounds.WEIGHT))


def calibrate_one(
    base: str,
    inputs: CompositionInputs,
    method: str,
    training: Mapping[str, Any],
    steering: Steering,
    out: Path,
    dora: str | None = None,
) -> None:
    """Compose adapters by one method into the PEFT directory ``out``.

    Args:
        base: Directory or hub name of the base.
        inputs: PEFT LoRA directories, and examples for methods that need some.
        method: The method's name, with variants.
        training: Fields of ``TrainSettings``.
        steering: The merge's weights, and the merge under a correction.
        out: The directory to create.
        dora: ``svd`` or ``svd=RANK``: take the nearest low-rank update of adapters with DoRA.

    Raises:
        InputError: An unknown method, or flags that do not go with it.
    """
    from caliport.calibrate.training.loop import TrainSettings

    try:
        parsed = parse(method)
    except ValueError as error:
        raise InputError(f"--method: {error}") from None
    if dora is not None:
        try:
            dora_rank(dora)
        except ValueError as error:
            raise InputError(f"--dora: {error}") from None
    if parsed.kind not in (*MERGED, *WEIGHTED, *CORRECTED) or parsed.shared:
        raise InputError(f"--method {method} needs a recipe; see caliport init")
    count = len(inputs.adapters)
    steering.check(parsed, count)
    searches = steering.weights == SEARCH
    if (parsed.kind not in MERGED or searches) and inputs.examples is None:
        what = f"--method {method}" if parsed.kind not in MERGED else f"--weight {SEARCH}"
        raise InputError(f"{what} needs --data, examples of the composition")
    if searches:
        inputs = _held_out(inputs)
    elif steering.weights:
        weights = [number(w, "a weight", -bounds.WEIGHT, bounds.WEIGHT) for w in steering.weights]
        inputs = replace(inputs, weights=tuple(map(float, weights)))
    settings = ComposeSettings(
        base,
        parsed,
        TrainSettings(**training) if parsed.kind in CORRECTED else None,
        merge=steering.merge,
        search=searches,
        target_modules=steering.targets,
        parameters={
            "density": 0.5 if steering.density is None else steering.density,
            "seed": training["seed"],
        },
        dora=dora,
        any_base=steering.any_base,
    )
    compose_to(out, f"{method} of {count} adapters", inputs, settings)
    console.print(f"composed adapter: {out}")


def _held_out(inputs: CompositionInputs) -> CompositionInputs:
    """The same inputs with a fifth of the examples held out, at most 64, if none are yet."""
    source = inputs.examples
    assert source is not None
    if source.tuning:
        return inputs
    count = len(read_jsonl(source.path))
    if count < _FEWEST:
        raise InputError(
            f"{source.path}: {count} examples; --weight {SEARCH} holds a fifth of them out, "
            f"expected at least {_FEWEST}"
        )
    return replace(inputs, examples=replace(source, tuning=min(FEW_SHOT, count // 5)))


def inputs_of(adapters: Sequence[Path], data: Path | None, prompt: str | None) -> CompositionInputs:
    """Adapters by their number, with examples if there is data, and their prompt if it is known."""
    source = None if data is None else Source(data, PLAIN if prompt is None else prompt)
    numbered = {str(index): path for index, path in enumerate(adapters, start=1)}
    names = tuple(printable(path.resolve().name, 100) for path in adapters)
    return CompositionInputs(numbered, source, prompt, names)


def features_one(
    base: str,
    source: Source,
    ranks: Sequence[str],
    training: Mapping[str, Any],
    earlier: Path | None,
    out: Path,
) -> None:
    """Train FLix features on examples that name their features.

    Args:
        base: Directory or hub name of the base.
        source: Examples with ``features``.
        ranks: ``NAME=RANK`` of each feature to train.
        training: Fields of ``TrainSettings``.
        earlier: A directory of features trained earlier, which are copied unchanged.
        out: The directory to create, with one PEFT directory per feature.

    Raises:
        InputError: A rank that is not ``NAME=RANK``.
    """
    from caliport.calibrate.training.flix import FeatureSettings
    from caliport.calibrate.training.loop import TrainSettings

    found = {}
    for text in ranks:
        name, _, rank = text.partition("=")
        if re.fullmatch(r"[0-9]{1,9}", rank) is None:
            raise InputError(f"--rank {shown(text)}: expected NAME=RANK, such as de=8")
        check_name(name, "--rank: the feature")
        found[name] = int(number(int(rank), f"--rank: {name}", 1, bounds.RANK, whole=True))
    features_to(
        out,
        f"FLix: {', '.join(found)}",
        [source],
        FeatureSettings(found),
        Training(base, TrainSettings(**training)),
        earlier,
    )
    console.print(f"features: {out}")
