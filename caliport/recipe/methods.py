"""The names of methods: a kind and its variants, such as ``lc++-per-layer-int4``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from caliport.calibrate.corrections.registry import CORRECTIONS
from caliport.calibrate.merges.by_loss.registry import WEIGHT_SEARCHES
from caliport.calibrate.merges.registry import MERGES
from caliport.core.untrusted import shown
from caliport.recipe import bounds

SCORED = ("zero-shot", "lora", "multi-step")
"""Kinds that produce no adapter; scored for comparison."""
MERGED = tuple(MERGES)
"""Kinds that need no data."""
WEIGHTED = tuple(WEIGHT_SEARCHES)
"""Kinds that choose one weight per adapter by its loss on examples."""
CORRECTED = tuple(CORRECTIONS)
"""Kinds that train a correction on top of the frozen adapters."""
TRAINED = ("joint", "mixture", "flix")
"""Kinds that train adapters, on the compositions or on a mixture of data sets."""
KINDS = (*SCORED, *MERGED, *WEIGHTED, *CORRECTED, *TRAINED)

_VARIANTS = ("per-layer", "shared", "alone", "int8", "int4", "bundle")
_LABELS = {
    "zero-shot": "base alone",
    "lora": "each LoRA alone",
    "multi-step": "multi-step",
    "joint": "joint-expert LoRA",
    "mixture": "one LoRA on the mixture",
    "flix": "FLix",
}


@dataclass(frozen=True)
class Method:
    """A method with its variants.

    Attributes:
        name: Its name in a recipe.
        kind: One of ``KINDS``.
        per_layer: One correction per layer instead of one shared by all layers.
        shared: One correction for all compositions of the recipe.
        alone: The correction without merged LoRAs.
        precision: Precision of the weights that the correction is trained through; None for float.
        bundle: These weights ship beside the update instead of being folded with it.
    """

    name: str
    kind: str
    per_layer: bool = False
    shared: bool = False
    alone: bool = False
    precision: str | None = None
    bundle: bool = False

    @property
    def composed(self) -> bool:
        """Whether it produces one adapter for a composition."""
        return self.kind not in SCORED

    @property
    def small(self) -> bool:
        """Whether it adds kilobytes at most to the single-task adapters."""
        return self.kind in (*MERGED, *WEIGHTED, *CORRECTED)

    @property
    def label(self) -> str:
        """Its name in tables and reports."""
        words = [
            "one per layer" if self.per_layer else "",
            "shared by all compositions" if self.shared else "",
            "without merged LoRAs" if self.alone else "",
            f"through {self.precision}{' bundle' if self.bundle else ''}" if self.precision else "",
        ]
        return ", ".join([_label_of(self.kind), *filter(None, words)])


def parse(name: str) -> Method:
    """Read a method's name: a kind, then variants in this order, joined by hyphens.

    ``per-layer``, ``shared``, ``alone``, ``int8`` or ``int4``, ``bundle``; corrections only.

    Raises:
        ValueError: The name is invalid; the message says what was expected.
    """
    kinds = [kind for kind in KINDS if name == kind or name.startswith(f"{kind}-")]
    if not kinds:
        raise ValueError(f"{name!r} is not a method; expected one of {', '.join(KINDS)}")
    kind = max(kinds, key=len)
    rest = name.removeprefix(kind)
    found = []
    for variant in _VARIANTS:
        if rest.startswith(f"-{variant}"):
            found.append(variant)
            rest = rest.removeprefix(f"-{variant}")
    precision = next((v for v in found if v in ("int8", "int4")), None)
    if rest or {"int8", "int4"} <= set(found):
        raise ValueError(
            f"{name!r}: expected {kind} and then, in this order, any of "
            "-per-layer, -shared, -alone, -int8 or -int4, -bundle"
        )
    if found and kind not in CORRECTED:
        raise ValueError(f"{name!r}: only {', '.join(CORRECTED)} have variants")
    if "bundle" in found and precision is None:
        raise ValueError(f"{name!r}: -bundle goes with -int8 or -int4")
    if "alone" in found and not CORRECTIONS[kind].alone:
        raise ValueError(f"{name!r}: {CORRECTIONS[kind].limits}")
    if "per-layer" in found and not CORRECTIONS[kind].per_layer:
        raise ValueError(f"{name!r}: every layer has its own already; expected {kind}")
    return Method(
        name,
        kind,
        "per-layer" in found,
        "shared" in found,
        "alone" in found,
        precision,
        "bundle" in found,
    )


def dora_rank(text: str) -> int | None:
    """The rank that ``svd`` (None: twice the adapter's) or ``svd=RANK`` names for DoRA.

    Raises:
        ValueError: Other text.
    """
    found = re.fullmatch(r"svd(?:=([0-9]{1,9}))?", text)
    if found is None or not 0 < int(found[1] or 1) <= bounds.RANK:
        raise ValueError(
            f"found {shown(text)}, expected svd or svd=RANK with a rank from 1 to {bounds.RANK:,}"
        )
    return int(found[1]) if found[1] else None


def _label_of(kind: str) -> str:
    for registry in (MERGES, WEIGHT_SEARCHES, CORRECTIONS):
        if kind in registry:
            return registry[kind].label
    return _LABELS[kind]
