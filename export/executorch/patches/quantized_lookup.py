"""Look up an embedding's rows in its quantized table while a decoder is traced.

Upstream: torch 2.13, ``torch.nn.Embedding.forward`` looks them up in a float table. ExecuTorch 1.5
turns such lookups into lookups in a quantized table, ``quantized_decomposed.embedding_byte`` and
``embedding_4bit``, by matching a pattern and folding the constants in it. That needs the table's
contents, which do not exist while a skeleton is lowered.

Without the patch a program would look up rows of zeros. With another release, export fails with an
error.
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
    """While the body runs, embeddings with ``weight_data`` look up their rows in it.

    Raises:
        InputError: The installed release was not tested with this patch.
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
        # The operator reads the high half of a byte first, all other kernels the low half.
        return rows.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)

    with swapped_here(nn.Embedding, "forward", forward):
        yield
