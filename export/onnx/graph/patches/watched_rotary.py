"""Observe which queries and keys a decoder's rotary embeddings rotate, and by which tables.

Upstream: transformers 5.23, ``apply_rotary_pos_emb`` in each family's modelling file. It is a plain
function, so the rotation cannot be observed with a module hook.

With another release the patch is skipped: the graph rotates queries and keys in separate nodes
instead of in ``GroupQueryAttention``, which is slower and gives the same logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from caliport.core.patching import is_tested, swapped_here

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RELEASES = ("transformers==5.23.*",)
_APPLY = "apply_rotary_pos_emb"


@contextmanager
def watched_rotary(
    model: PreTrainedModel, watched: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """While the body runs, the model's family uses ``watched(apply_rotary_pos_emb)``."""
    files = {type(m).__module__ for m in model.modules() if hasattr(m, "layer_idx")}
    with ExitStack() as stack:
        for file in sorted(files) if is_tested(RELEASES) else ():
            namespace = sys.modules[file]
            plain = getattr(namespace, _APPLY, None)
            if plain is not None:
                stack.enter_context(swapped_here(namespace, _APPLY, watched(plain)))
        yield
