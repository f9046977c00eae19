"""Skip pattern searches that never match a decoder.

Upstream: executorch 1.5.1, in ``executorch.backends.xnnpack.partition.graphs``. The functions
``sdpa.get_graphs`` and ``bilinear_2d.get_graphs_dict`` trace reference graphs of plain attention
and of image scaling, which XNNPACK's passes search for. Attention is one custom operator here,
or composed of products that XNNPACK takes one by one, and there are no images.

With another release the patch is skipped: lowering takes longer and gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from caliport.core.patching import is_tested, swapped

RELEASES = ("executorch==1.5.*",)


@contextmanager
def skip_patterns() -> Iterator[None]:
    """While the body runs, XNNPACK's passes get no pattern graphs."""
    if not is_tested(RELEASES):
        yield
        return
    from executorch.backends.xnnpack.partition.graphs import bilinear_2d, sdpa

    with swapped(sdpa, "get_graphs", list), swapped(bilinear_2d, "get_graphs_dict", dict):
        yield
