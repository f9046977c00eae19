"""``caliport calibrate`` without a recipe: one composition, or FLix features, from flags."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caliport.core.errors import InputError, printable
from caliport.core.progress import console
from caliport.core.prompts import PLAIN
from caliport.core.untrusted import check_name, number, shown
from caliport.recipe import bounds
from caliport.recipe.methods import CORRECTED, MERGED, WEIGHTED, dora_rank, parse
from caliport.stages.compose import ComposeSettings, CompositionInputs, compose_to
from caliport.stages.sources import Source
from caliport.stages.train import Training, features_to


def calibrate_one(
    base: str,
    inputs: CompositionInputs,
    method: str,
    training: Mapping[str, Any],
    weights: Sequence[float],
    out: Path,
    dora: str | None = None,
) -> None:
    """Compose adapters by one method into the PEFT directory ``out``.

    Args:
        base: Directory or hub name of the base.
        inputs: PEFT LoRA directories, and examples for methods that need some.
        method: The method's name, with variants.
        training: Fields of ``TrainSettings``.
        weights: One per adapter for a merge; empty: equal.
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
    if weights and parsed.kind not in MERGED:
        raise InputError(f"--weight goes with {', '.join(MERGED)}; {method} finds its own")
    count = len(inputs.adapters)
    if weights and len(weights) != count:
        raise InputError(f"found {len(weights)} --weight for {count} --adapter; expected one each")
    if parsed.kind not in MERGED and inputs.examples is None:
        raise InputError(f"--method {method} needs --data, examples of the composition")
    settings = ComposeSettings(
        base,
        parsed,
        TrainSettings(**training) if parsed.kind in CORRECTED else None,
        weights=tuple(weights) or None,
        parameters={"density": 0.5, "seed": training["seed"]},
        dora=dora,
    )
    compose_to(out, f"{method} of {count} adapters", inputs, settings)
    console.print(f"composed adapter: {out}")


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
