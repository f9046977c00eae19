"""How fast this machine reads memory, and how much of that decoding needs."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_SYSTEM = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LEAST, _MOST = 1 << 28, 1 << 30
_CACHES = 8  # the buffer is that many times the cache, which then hides an eighth at most
_COLUMNS = 4096
_PASSES = 3


def last_level_cache() -> int | None:
    """Bytes of the largest cache of a core, None where the system does not say (not on Linux)."""
    sizes = [
        int(match[1]) * _UNITS[match[2]]
        for path in _SYSTEM.glob("index*/size")
        if (match := re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()))
    ]
    return max(sizes, default=None)


class Reading:
    """Reads a buffer far larger than the cache, again and again, with some threads.

    Each thread multiplies its part, a float32 matrix, with a vector that stays in its cache: two
    operations for four bytes, as a decoder does. Of what numpy and torch offer (sums, maxima, dot
    products) this reads fastest. The library must run it in one thread
    (``OPENBLAS_NUM_THREADS=1``).

    Attributes:
        size: Of the buffer in bytes: eight times the cache, from 256 MB to 1 GB, and an eighth of
            the memory available at most.
    """

    def __init__(self, threads: int, available: int) -> None:
        import numpy as np

        wanted = max(_LEAST, min(_MOST, _CACHES * (last_level_cache() or 0)))
        rows = max(1, min(wanted, available // 8) // (4 * _COLUMNS * threads))
        self.size = 4 * _COLUMNS * rows * threads
        self._parts = [np.ones((rows, _COLUMNS), np.float32) for _ in range(threads)]
        self._vector = np.ones(_COLUMNS, np.float32)
        self._pool = ThreadPoolExecutor(threads)

    def passes(self) -> list[float]:
        """Seconds of each of a few passes over the whole buffer."""
        times = []
        for _ in range(_PASSES):
            start = time.perf_counter()
            list(self._pool.map(lambda part: part @ self._vector, self._parts))
            times.append(time.perf_counter() - start)
        return times


def token_bytes(manifest: Mapping[str, Any], position: float) -> int | None:
    """Bytes that decoding one token must read: all weights but a table only looked up, and cache.

    Args:
        manifest: Of an artifact; ``sizes``, ``base`` and ``quantization`` count.
        position: Tokens in the cache, on average.

    Returns:
        None where the manifest does not say. Of a bundle, without a composition's own terms.
    """
    sizes, base = manifest.get("sizes", {}), manifest.get("base", {})
    if "total" not in sizes:
        return None
    read = int(sizes["total"])
    if sizes["head"]:  # else the head is the table, and is read
        read -= sizes["embedding"] + _table_scales(sizes["embedding"], base)
    width = 1 if manifest.get("quantization", {}).get("cache_bits") == 8 else 4
    return read + round(position * width * base.get("cache_values", 0))


def _table_scales(embedding: int, base: Mapping[str, Any]) -> int:
    """Bytes of a table's scales: float32 a row of 8-bit values, bfloat16 for 32 4-bit values."""
    values = base["vocab_size"] * base["hidden_size"]
    bits = round(8 * embedding / values)
    return {8: 4 * base["vocab_size"], 4: values // 16}.get(bits, 0)


def bandwidth_share(
    read: int | None, rate: float, gigabytes: float, cache: int | None
) -> float | None:
    """Share of the bandwidth that decoding reaches.

    Args:
        read: Bytes a token, None where not known.
        rate: Tokens a second.
        gigabytes: The machine's, a second.
        cache: Bytes of the last-level cache, None where not known.

    Returns:
        None where ``read`` is not known, or fits the cache: then memory is not what is read.
    """
    if read is None or (cache is not None and read <= cache):
        return None
    return read * rate / (1e9 * gigabytes)
