"""Write the mean over a last dimension as a product with a constant while a decoder is traced.

Upstream: executorch 1.5.1, ``executorch.backends.xnnpack.partition``: XNNPACK takes no mean over a
last dimension. A norm's mean would leave the delegate for a slow operator and cut the delegate in
two, which costs a decode step of a model of a billion parameters some 7 %.

With another release the patch is left out: the program is slower, its results differ by the order
of sums in float.
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
    """While the body runs, means over last dimensions of these sizes are products.

    Args:
        decoder: What is traced; takes the constants as buffers.
        sizes: Of the last dimension.
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
