"""The largest numbers that recipes and flags may name: far beyond any use, and safe."""

from __future__ import annotations

COUNT = 10_000_000
"""Of steps, examples and rows."""
TOKENS = 1 << 24
"""Of contexts, prompts and answers."""
RANK = 1 << 16
"""Of an adapter."""
THREADS = 1024
"""Of a runtime, and cores of a machine."""
ROUNDS = 10_000
"""Of a measurement."""
SEED = 10**12
"""A training multiplies it by a million, which must fit 64 bits."""
RATE = 1e3
"""Of learning."""
WEIGHT = 1e6
"""Of an adapter in a merge: ``caliport.calibrate.merges.common.LARGEST_WEIGHT``."""
SECONDS = 30 * 86_400.0
"""That anything may be waited for."""
BYTES = 10**13
"""Of an artifact."""
