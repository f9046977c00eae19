"""Quantize a weight slice by slice with the quantizer of its form."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from caliport.core.patching import use_one_thread
from caliport.export.quantization.choices import Form
from caliport.export.quantization.quantizers.registry import quantizer_of

_SLICE = 1 << 19


def integers(
    rows: Callable[[int, int], Tensor],
    count: int,
    width: int,
    form: Form,
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Quantize a weight slice by slice, so that only a few slices are ever in memory.

    Args:
        rows: Returns the float weight's rows from ``start`` to ``stop``, [stop - start, width].
        count: Number of rows.
        width: Length of a row.
        form: ``int8``: one scale per row. ``int4``: one scale per 32 values, rounded to bfloat16.
            Embeddings (``rows …``) have the same integers.
        quantize: Finds the integers and scales of some rows; default the form's quantizer without
            text.

    Yields:
        Data, int8 [n, width] or two 4-bit values per byte (read by ``unpacked``), uint8
        [n, width / 2], and scale, float32 [n, 1] or bfloat16 [n, width / 32].
    """
    step = max(1, _SLICE // width)
    default = quantizer_of(form).quantize
    work = quantize or (lambda part: default(part, None))

    def one(start: int) -> tuple[Tensor, Tensor]:
        return work(rows(start, start + step).float())

    threads = torch.get_num_threads()
    starts = range(0, count, step)
    # Slices are small: each thread takes one, and no slice is split further.
    with ThreadPoolExecutor(threads, initializer=use_one_thread) as pool:
        waiting: deque[Future[tuple[Tensor, Tensor]]] = deque()
        for start in starts:
            waiting.append(pool.submit(one, start))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
