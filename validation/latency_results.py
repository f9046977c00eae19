"""Records of ``latency.json``: times and memory of artifacts, and how the machine was meanwhile."""

from __future__ import annotations

from validation.record import Machine, Record, shown_form


class Spread(Record):
    """Repeated measurements.

    Attributes:
        median, low, high: The middle one, the lowest and the highest.
        interval: Holds the true median with a probability of ``level``, whatever the distribution,
            where the measurements are independent; its ends are two of them.
        level: 0.95 at least, or what the whole range reaches where they are fewer than six.
        values: In the order in which they were made; of a rate or a time to the first token, one a
            round.
    """

    median: float
    low: float
    high: float
    interval: tuple[float, float]
    level: float
    values: tuple[float, ...]


class LatencyResult(Record):
    """Times and memory of one artifact on this machine.

    Attributes:
        files: Bytes of each file; ``bytes`` is their sum.
        bundle: Whether it is one of several compositions over one base.
        threads: Of the runtime.
        pinned: Whether its process was held to as many cores as threads.
        repetitions: Rounds; a round's time is the median of the answers of one turn.
        load_seconds: In a fresh process, files in the page cache, libraries imported: from opening
            to the first token read.
        first_token_seconds: From the prompt to the first token.
        decode_rate: Tokens a second after the first.
        token_p90_seconds: Nine of ten tokens after the first came within this time.
        idle_bytes, load_peak_bytes, peak_bytes: Resident memory of the process before the load,
            at its highest after the load, and after all answers; None where the system does not
            say.
        token_bytes: Weights and cache read for each token that is decoded; None where the manifest
            does not say.
        bandwidth_share: ``token_bytes`` times the decode rate, of the machine's read bandwidth;
            None where ``token_bytes`` is not known or fits the processor's cache.
        noise: Why the times cannot be compared; None where they can.
    """

    composition: str
    runtime: str
    precision: str
    path: str
    bytes: int
    files: dict[str, int]
    bundle: bool = False
    threads: int
    pinned: bool
    prompt_tokens: int
    new_tokens: int
    repetitions: int
    load_seconds: Spread
    first_token_seconds: Spread
    decode_rate: Spread
    token_p90_seconds: float
    idle_bytes: int | None
    load_peak_bytes: int | None
    peak_bytes: int | None
    token_bytes: int | None
    bandwidth_share: float | None
    noise: str | None

    @property
    def form(self) -> str:
        """How it ships, such as ``int4`` or ``int4 bundle``."""
        return shown_form(self.precision, self.bundle)

    @property
    def noisy(self) -> bool:
        """Whether the times are too noisy to compare."""
        return self.noise is not None


class Conditions(Record):
    """How the machine was while artifacts took their turns.

    Attributes:
        calibration: Seconds of the same reading of memory before every turn.
        load_average: Processes that ran or waited, over the minute before.
        steal: Share of the cores' time that a hypervisor gave to others.
        others: Cores that other processes kept busy, on average.
        noise: Why nothing measured meanwhile can be compared; None where it can.
    """

    calibration: Spread
    load_average: float | None
    steal: float | None
    others: float
    noise: str | None


class LatencyReport(Record):
    """``latency.json``: times are reported and never gated.

    Attributes:
        seed: Of the order of the turns.
        cores: To which the processes were held; none where the system has no way to.
        bandwidth_gbs: Highest rate of reading memory with as many threads, GB (1e9 bytes) a second.
        cache_bytes: The processor's last-level cache; None where the system does not say.
    """

    machine: Machine
    versions: dict[str, str]
    seed: int
    cores: tuple[int, ...]
    bandwidth_gbs: float
    cache_bytes: int | None
    conditions: Conditions
    artifacts: list[LatencyResult]
