"""Let a Hugging Face decoder attend, and make its masks, through functions of ours.

Upstream: transformers 5.23, ``AttentionInterface`` and ``AttentionMaskInterface``. Functions are
registered by name for the whole process and chosen by a field of the config. A name can only be
removed from the mapping behind it, which is private.

Without the patch a program would lack its cache. With another release exporting is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from caliport.core.patching import check_tested

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RELEASES = ("transformers==5.23.*",)
_NAME = "caliport"


@contextmanager
def own_attention(
    model: PreTrainedModel, attention: Callable[..., Any], mask: Callable[..., Any]
) -> Iterator[None]:
    """While the body runs, a model attends through ``attention``.

    Args:
        model: Left as it was.
        attention: Has the form of the functions in ``transformers.AttentionInterface``.
        mask: Has the form of those in ``transformers.AttentionMaskInterface``. Called once for each
            pass and kind of layer; what it returns is the attention's ``attention_mask``.

    Raises:
        InputError: A release that this was not tested with is installed.
    """
    check_tested(RELEASES)
    from transformers import AttentionInterface, AttentionMaskInterface

    config = model.config.get_text_config()
    before = config._attn_implementation
    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, mask)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        AttentionInterface._global_mapping.pop(_NAME)
        AttentionMaskInterface._global_mapping.pop(_NAME)
