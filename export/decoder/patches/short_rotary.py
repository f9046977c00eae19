"""Fix rotary embeddings at their frequencies for short texts.

Upstream: transformers 5.23, ``modeling_rope_utils.dynamic_rope_update``. Rotary embeddings of the
kinds ``longrope`` and ``dynamic`` choose their frequencies from the positions in every pass, which
cannot be traced. ``caliport.export.decoder.checks`` limits the context to the length of a short
text.

Without the patch these models cannot be traced. With another release, their export fails with an
error.
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
"""Kinds whose frequencies depend on text length, with the field for a short text's length."""


@contextmanager
def short_rotary(model: PreTrainedModel) -> Iterator[None]:
    """While the body runs, a model's rotary embeddings do not depend on the length of a text.

    Raises:
        InputError: They depend on it, and the installed release was not tested with this patch.
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
