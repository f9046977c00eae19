"""Host latency of artifacts: measured, reported, never gated."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import numpy as np

from caliport_core.errors import InputError
from caliport_core.progress import Advance
from validation.results import LatencyResult, Spread, file_sizes
from validation.runner import Runner, artifact_form, open_runner

_NOISY = 0.2  # share of the median


def measure(
    directory: Path,
    prompt: list[int],
    new_tokens: int,
    repetitions: int,
    threads: int,
    *,
    composition: str = "",
    progress: Advance | None = None,
) -> LatencyResult:
    """Load, answer once to warm up, then time ``repetitions`` loads and greedy answers.

    The clock includes our runner's own work on each token (an argmax and a copy of the logits),
    as any caller's would.

    Args:
        directory: An artifact directory.
        prompt: Token ids.
        new_tokens: Tokens to write, ends ignored; the first comes from the prefill.
        repetitions: How often, at least 1.
        threads: Of the runtime.
        composition: Its name in the report.
        progress: Called with the number of repetitions done.

    Raises:
        InputError: No artifact, a prompt and answer that exceed its context, or numbers below
            what can be timed (one repetition, two new tokens).
    """
    runtime, precision = artifact_form(directory)
    if repetitions < 1 or new_tokens < 2 or not prompt:
        raise InputError(
            f"latency: {repetitions} repetitions of {new_tokens} new tokens after {len(prompt)}; "
            "expected at least 1, 2 and 1"
        )
    runner = open_runner(directory, threads)
    if len(prompt) + new_tokens > runner.context:
        raise InputError(
            f"latency: {len(prompt)} + {new_tokens} tokens exceed the context of {runner.context} "
            f"of {directory}"
        )
    _answer(runner, prompt, new_tokens)
    loads, firsts, rates = [], [], []
    for repetition in range(repetitions):
        start = time.perf_counter()
        runner = open_runner(directory, threads)
        loads.append(time.perf_counter() - start)
        # The first pass of a fresh session allocates and packs; that is load time's, not ours.
        runner.prefill(prompt)
        first, rate = _answer(runner, prompt, new_tokens)
        firsts.append(first)
        rates.append(rate)
        if progress is not None:
            progress(repetition + 1, f"{rate:.0f} tok/s")
    sizes = file_sizes(directory)
    return LatencyResult(
        composition=composition,
        runtime=runtime,
        precision=precision,
        path=f"{composition}/{directory.name}" if composition else directory.name,
        bytes=sum(sizes.values()),
        files=sizes,
        threads=threads,
        prompt_tokens=len(prompt),
        new_tokens=new_tokens,
        repetitions=repetitions,
        load_seconds=_spread(loads),
        first_token_seconds=_spread(firsts),
        decode_rate=_spread(rates),
        noisy=max(rates) - min(rates) > _NOISY * median(rates),
    )


def _answer(runner: Runner, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens a second after it."""
    start = time.perf_counter()
    token = int(np.argmax(runner.prefill(prompt)))
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        token = int(np.argmax(runner.step(token)))
    return first - start, (new_tokens - 1) / (time.perf_counter() - first)


def _spread(values: list[float]) -> Spread:
    return Spread(median=median(values), low=min(values), high=max(values))
