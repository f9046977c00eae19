"""XXX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caliport.core.errors import InputError
from caliport.core.progress import console
from caliport.recipe.methods import CORRECTED, MERGED, WEIGHTED, parse
from caliport.stages.compose import How, Job, compose_to
from caliport.stages.sources import Source
from caliport.stages.train import Training, features_to


def calibrate_one(
    base: str,
    adapters: Sequence[Path],
    method: str,
    data: Path | None,
    prompt: str,
    training: Mapping[str, Any],
    weights: Sequence[float],
    out: Path,
) -> None:
    """Compose adapters by one method into ``out``."""
    from caliport.calibrate.training.loop import TrainSettings

    try:
        parsed = parse(method)
    except ValueError as error:
        raise InputError(f"--method: {error}") from None
    if parsed.kind not in (*MERGED, *WEIGHTED, *CORRECTED) or parsed.shared:
        raise InputError(f"--method {method} needs a recipe; see caliport init")
    if weights and parsed.kind not in MERGED:
        raise InputError(f"--weight goes with {', '.join(MERGED)}; {method} finds its own")
    if weights and len(weights) != len(adapters):
        raise InputError(
            f"found {len(weights)} --weight for {len(adapters)} --adapter; expected one each"
        )
    if parsed.kind not in MERGED and data is None:
        raise InputError(f"--method {method} needs --data, examples of the composition")
    job = Job(
        {str(index): path for index, path in enumerate(adapters, start=1)},
        Source(data, prompt) if data is not None else None,
    )
    train = TrainSettings(**training) if parsed.kind in CORRECTED else None
    how = How(base, parsed, train, weights=tuple(weights) or None, seed=training["seed"])
    compose_to(out, f"{method} of {len(adapters)} adapters", job, how)
    console.print(f"composed adapter: {out}")


def features_one(
    base: str,
    data: Path,
    prompt: str,
    ranks: Sequence[str],
    training: Mapping[str, Any],
    earlier: Path | None,
    out: Path,
) -> None:
    """Train FLix features on examples that name theirs; ``earlier`` ones stay as they are.

    Args:
        base: Directory or hub name of the base.
        data: JSON Lines with ``features``.
        prompt: Around each input.
        ranks: ``NAME=RANK`` of each feature to train.
        training: Fields of ``TrainSettings``.
        earlier: A directory of features trained earlier.
        out: The directory to appear, with a PEFT directory a feature.
    """
    from caliport.calibrate.training.flix import FeatureSettings
    from caliport.calibrate.training.loop import TrainSettings

    found = {}
    for text in ranks:
        name, _, rank = text.partition("=")
        if not name.replace("_", "").replace("-", "").isalnum() or not rank.isdecimal():
            raise InputError(f"--rank {text}: expected NAME=RANK, such as de=8")
        if int(rank) < 1:
            raise InputError(f"--rank {text}: expected a rank of at least 1")
        found[name] = int(rank)
    features_to(
        out,
        f"FLix: {', '.join(found)}",
        [Source(data, prompt)],
        FeatureSettings(found),
        Training(base, TrainSettings(**training)),
        earlier,
    )
    console.print(f"features: {out}")
