"""A fixed set of prompts for when none are given."""

from __future__ import annotations

import random
from collections.abc import Collection

from caliport.core.errors import InputError

TEXTS = (
    "Hello, how are you?",
    "The meeting is on Monday at nine. Please bring the report.",
    "Ann: Are you free tonight?\nBen: Yes, let us cook at my place.",
    "¿Dónde está la estación? El niño llega mañana.",
    "Où est la gare ? La fête a lieu près de l'église.",
    "Der Zug fährt um zwölf Uhr. Wir müssen früh aufbrechen, heißt es.",
    "1, 2, 3, 5, 8, 13, 21, 34",
    "def add(a, b):\n    return a + b",
)
"""Short texts in a few languages, for tokenizers that can write them."""

SEED = 20240229
"""Of the built-in prompts."""


def builtin_prompts(
    vocab_size: int, special_ids: Collection[int] = (), count: int = 16, longest: int = 48
) -> list[list[int]]:
    """Token sequences that are the same in every run and suit any vocabulary.

    A third are drawn evenly from the whole vocabulary, a third from its first tenth, which most
    tokenizers give to the commonest pieces, and a third repeat a short phrase, which shows faults
    of position and cache that random sequences hide.

    Args:
        vocab_size: Ids stay below it.
        special_ids: Ids to leave out.
        count: How many prompts.
        longest: Tokens of the longest; the shortest has one.

    Raises:
        InputError: No ordinary token is left.
    """
    special = set(special_ids)
    ordinary = [i for i in range(vocab_size) if i not in special]
    if not ordinary or longest < 1:
        raise InputError(
            f"{vocab_size} tokens of which {len(special)} are special, prompts up to {longest} "
            "tokens: no room for the built-in prompts; name a prompts file"
        )
    draw = random.Random(SEED)
    common = ordinary[: max(1, len(ordinary) // 10)]
    prompts = []
    for index in range(count):
        length = 1 + (longest - 1) * index // max(1, count - 1)
        pool = common if index % 3 == 1 else ordinary
        tokens = [pool[draw.randrange(len(pool))] for _ in range(length)]
        if index % 3 == 2:
            phrase = tokens[: max(1, length // 4)]
            tokens = (phrase * length)[:length]
        prompts.append(tokens)
    return prompts
