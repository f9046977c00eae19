"""Hold rotary embeddings at the frequencies of short texts.

Upstream: transformers 5.23, ``modeling_rope_utils.dynamic_rope_update``. Rotary embeddings of the
kinds ``longrope`` and ``dynamic`` look at the positions in every pass to choose their frequencies,
which cannot be traced. ``caliport.export.decoder.checks`` keeps the context within a short text's.

Without the patch these models cannot be traced. With another release they are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from caliport.core.patching import check_tested

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RELEASES = ("transformers==5.23.*",)

SHORT_TEXTS = {
    "longrope": "original_max_position_embeddings",
    "dynamic": "max_position_embeddings",
}
"""The kinds that depend on the length of a text, with the field for the length of a short one."""


@contextmanager
def short_rotary(model: PreTrainedModel) -> Iterator[None]:
    """While the body runs, a model's rotary embeddings do not depend on the length of a text.

    Raises:
        InputError: They did, and a release that this was not tested with is installed.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if hasattr(module, "rope_type"):
                stack.enter_context(_fixed(module))
        yield


@contextmanager
def _fixed(module: Any) -> Iterator[None]:
    before = module.rope_type
    nested = before if isinstance(before, dict) else {"": before}
    after = {name: "default" if kind in SHORT_TEXTS else kind for name, kind in nested.items()}
    if after != nested:
        check_tested(RELEASES)
    kept: dict[str, Any] = {}
    for name in (name for name in nested if nested[name] != after[name]):
        prefix = f"{name}_" if name else ""
        kept[f"{prefix}inv_freq"] = getattr(module, f"{prefix}inv_freq")
        setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))
    module.rope_type = after if isinstance(before, dict) else after[""]
    try:
        yield
    finally:
        module.rope_type = before
        for name, value in kept.items():
            setattr(module, name, value)
