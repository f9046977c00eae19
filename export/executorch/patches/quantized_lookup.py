"""Look rows of an embedding up in its quantized table while a decoder is traced.

Upstream: torch 2.13, ``torch.nn.Embedding.forward`` looks them up in a float table. ExecuTorch 1.5
makes lookups in a quantized table, ``quantized_decomposed.embedding_byte`` and ``embedding_4bit``,
of float ones by matching a pattern and folding the constants in it, which needs the table's
contents. While a skeleton is lowered there are none.

Without the patch a program would look up rows of zeros. With another release it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from caliport.core.patching import check_tested, swapped_here

RELEASES = ("executorch==1.5.*", "torch==2.13.*")


@contextmanager
def quantized_lookup() -> Iterator[None]:
    """While the body runs, embeddings that have ``weight_data`` look their rows up in it.

    Raises:
        InputError: A release that this was not tested with is installed.
    """
    check_tested(RELEASES)
    import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401  registers the ops

    plain = nn.Embedding.forward
    ops = torch.ops.quantized_decomposed

    def forward(self: nn.Embedding, input: Tensor) -> Tensor:
        parts = dict(self.named_parameters(recurse=False))
        if "weight_data" not in parts:
            return plain(self, input)
        data, scale = parts["weight_data"], parts["weight_scale"]
        if data.dtype == torch.int8:
            return ops.embedding_byte(data, scale.flatten(), None, -128, 127, input)
        rows = ops.embedding_4bit(data, scale, None, -8, 7, input)
        # The operator takes the high half of a byte first, all other kernels the low half.
        return rows.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)

    with swapped_here(nn.Embedding, "forward", forward):
        yield
