"""Replace the attention and mask functions of a Hugging Face decoder.

Upstream: transformers 5.23, ``AttentionInterface`` and ``AttentionMaskInterface``. Functions are
registered by name for the whole process and chosen by a field of the config. A name can only be
removed through a private mapping.

Without the patch a program would have no cache. With another release, export fails with an error.
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
        model: Restored afterwards.
        attention: A function with the signature of those in ``transformers.AttentionInterface``.
        mask: A function with the signature of those in ``transformers.AttentionMaskInterface``.
            Called once per pass and kind of layer; its result is passed to ``attention`` as
            ``attention_mask``.

    Raises:
        InputError: The installed release was not tested with this patch.
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
