"""Replace the mean over the last dimension by a product with a constant during tracing.

Upstream: executorch 1.5.1, ``executorch.backends.xnnpack.partition``: XNNPACK does not take a mean
over the last dimension. A norm's mean would run outside the delegate in a slow operator and split
the delegate, which makes a decode step of a model of a billion parameters some 7 % slower.

With another release the patch is skipped: the program is slower, and its results differ by the
order of float sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from caliport.core.patching import is_tested, swapped_here

RELEASES = ("executorch==1.5.*",)


@contextmanager
def means_as_products(decoder: nn.Module, sizes: set[int]) -> Iterator[None]:
    """While the body runs, means over a last dimension of these sizes are products.

    Args:
        decoder: The traced module; the constants are registered as its buffers.
        sizes: Sizes of the last dimension.
    """
    if not is_tested(RELEASES):
        yield
        return
    plain = Tensor.mean
    for size in sizes:
        decoder.register_buffer(f"mean_of_{size}", torch.full((1, size), 1 / size))

    def mean(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(("dim", "keepdim"), args, strict=False)) | kwargs
        last = given.get("dim") in (-1, (-1,), [-1]) and given.get("keepdim")
        if not last or self.dtype != torch.float32 or self.shape[-1] not in sizes:
            return plain(self, *args, **kwargs)
        return nn.functional.linear(self, decoder.get_buffer(f"mean_of_{self.shape[-1]}"))

    with swapped_here(Tensor, "mean", mean):
        yield
