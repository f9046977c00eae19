"""The names of methods: a kind and what varies it, such as ``lc++-per-layer-int4``."""

from __future__ import annotations

from dataclasses import dataclass

SCORED = ("zero-shot", "lora", "multi-step")
"""Kinds that give no adapter of their own; they are scored for comparison."""
MERGED = ("linear", "exact", "svd", "ties", "dare", "slerp")
"""Kinds that need no data."""
WEIGHTED = ("lorahub", "lm-cocktail")
"""Kinds that choose one weight an adapter by losses."""
CORRECTED = ("lc", "lc++", "scales")
"""Kinds that train a correction on top of the frozen adapters."""
TRAINED = ("joint", "mixture", "flix")
"""Kinds that train adapters themselves, from the compositions or from a mixture of data sets."""
KINDS = (*SCORED, *MERGED, *WEIGHTED, *CORRECTED, *TRAINED)

_VARIANTS = ("per-layer", "shared", "alone", "int8", "int4", "bundle")
_LABELS = {
    "zero-shot": "base alone",
    "lora": "each LoRA alone",
    "multi-step": "multi-step",
    "linear": "linear merge (Eq. 5)",
    "exact": "exact merge",
    "svd": "SVD-truncated merge",
    "ties": "TIES",
    "dare": "DARE",
    "slerp": "SLERP",
    "lorahub": "LoraHub",
    "lm-cocktail": "LM-Cocktail",
    "lc": "LC (Eq. 6)",
    "lc++": "LC++ (Eq. 7)",
    "scales": "column scales",
    "joint": "joint-expert LoRA",
    "mixture": "one LoRA on the mixture",
    "flix": "FLix",
}


@dataclass(frozen=True)
class Method:
    """A method with its variants.

    Attributes:
        name: As written in a recipe.
        kind: One of ``KINDS``.
        per_layer: A correction for each layer instead of one shared by all.
        shared: One correction for all compositions of the recipe.
        alone: No merged LoRAs underneath.
        precision: Trained through weights that ship in this precision; None: in float.
        bundle: Those weights ship apart from the update, not folded with it.
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
        """Whether it gives one adapter for a composition."""
        return self.kind not in SCORED

    @property
    def small(self) -> bool:
        """Whether it adds kilobytes at most to the single-task adapters."""
        return self.kind in (*MERGED, *WEIGHTED, *CORRECTED)

    @property
    def label(self) -> str:
        """For people."""
        words = [
            "one a layer" if self.per_layer else "",
            "shared by all compositions" if self.shared else "",
            "without merged LoRAs" if self.alone else "",
            f"through {self.precision}{' bundle' if self.bundle else ''}" if self.precision else "",
        ]
        return ", ".join([_LABELS[self.kind], *filter(None, words)])


def parse(name: str) -> Method:
    """Read a method's name: a kind, then variants in this order, joined by hyphens.

    ``per-layer``, ``shared``, ``alone``, ``int8`` or ``int4``, ``bundle``; corrections only.

    Raises:
        ValueError: Says what is wrong and what would be right.
    """
    kinds = [kind for kind in KINDS if name == kind or name.startswith(f"{kind}-")]
    if not kinds:
        raise ValueError(f"{name!r} is no method; expected one of {', '.join(KINDS)}")
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
    if kind == "scales" and "alone" in found:
        raise ValueError(f"{name!r}: column scales need the LoRAs that they scale")
    return Method(
        name,
        kind,
        "per-layer" in found,
        "shared" in found,
        "alone" in found,
        precision,
        "bundle" in found,
    )
