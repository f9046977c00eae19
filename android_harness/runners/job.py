"""The job of a runner on a device and its result: one JSON file each.

Any program that reads ``Job`` and writes ``Result`` can be the runner. It is started as
``RUNNER job.json result.json`` in the directory that holds the job; every path in the job is
relative to that directory. It writes the result whole or not at all (beside, then renamed) and
exits with 0, or says in one line on standard error what is wrong and exits with 2.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, field_validator

from caliport.core.errors import InputError
from caliport.core.untrusted import number, shown
from caliport.export import runtime as runtimes
from caliport.validation.records.record import Amount, Count, Name, Record, Some

JOB, RESULT = "job.json", "result.json"
VERSION: Final = 1
_CORES = 8192  # as many as Linux can have
_LARGEST = 3.5e38  # float32
_ROUNDING = 1e-3
_ROUNDS = 10_000
_Core = Annotated[int, Field(ge=0, lt=1 << 31)]
_Id = Annotated[int, Field(ge=0, lt=1 << 31)]
_Length = Annotated[int, Field(ge=1, le=1 << 24)]


class Prompt(Record):
    """One text to answer.

    Attributes:
        tokens: The prompt, at least one.
        targets: Tokens that are fed after it whatever the model would say; logits are recorded
            after the prompt and after each target but the last. Empty leaves that out.
        write: Whether to answer it greedily too.
    """

    tokens: tuple[_Id, ...] = Field(min_length=1)
    targets: tuple[_Id, ...] = ()
    write: bool = True


class Timing(Record):
    """What to time, after the answers.

    Attributes:
        prompt_lengths: Tokens of each prompt; each is read ``repetitions`` times in turns.
        new_tokens: Tokens written after it, ends ignored: the first with the prompt, each further
            one by a step.
        warmup: Turns that are not recorded.
        repetitions: Turns that are.
    """

    prompt_lengths: tuple[_Length, ...] = Field(min_length=1)
    new_tokens: _Length
    warmup: int = Field(default=1, ge=0, le=_ROUNDS)
    repetitions: int = Field(default=5, ge=1, le=_ROUNDS)


class Job(Record):
    """What a runner is asked.

    Attributes:
        version: Of this schema.
        runtime: Of the artifact (``caliport.export.runtime.names``).
        directory: The artifact's.
        adapter: Of a bundle, what the runtime calls the composition (``Engine.selector``): a file
            in ``directory``, or a method; None for what runs without one.
        threads: Of the runtime's pool.
        cores: Cores to stay on; empty leaves that to the system.
        ends: Token ids that end an answer.
        max_new_tokens: Longest answer.
        top: Logits that are recorded at each position, the largest.
        prompts: What to answer.
        timing: What to time; None for nothing.
    """

    version: Literal[1] = VERSION
    runtime: str
    directory: str
    adapter: str | None = None
    threads: int = Field(ge=1, le=_CORES)
    cores: tuple[_Core, ...] = ()
    ends: tuple[_Id, ...] = ()
    max_new_tokens: _Length
    top: _Length = 10
    prompts: tuple[Prompt, ...] = ()
    timing: Timing | None = None

    @field_validator("runtime")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in runtimes.names():
            raise ValueError(f"found {name!r}, expected {' or '.join(runtimes.names())}")
        return name


class Row(Record):
    """Logits after one token.

    Attributes:
        ids: The tokens of the largest logits, largest first, lowest id first among equals.
        logits: Theirs.
        mean: Of all logits, in float64: a checksum.
        logsumexp: ln Σ exp of all logits, from which probabilities follow.
    """

    ids: tuple[Count, ...]
    logits: tuple[float, ...]
    mean: float
    logsumexp: float


class Answer(Record):
    """What a runner says to one prompt.

    Attributes:
        tokens: Greedy tokens, the ending one included; None where not asked for.
        rows: One a target.
    """

    tokens: tuple[Count, ...] | None
    rows: tuple[Row, ...] = ()


class Turn(Record):
    """One timed answer.

    Attributes:
        prompt_tokens: Length of the prompt.
        first_token_seconds: From its start until the first token was chosen.
        step_seconds: Of each further token.
    """

    prompt_tokens: Some
    first_token_seconds: Amount
    step_seconds: tuple[Amount, ...]


class Result(Record):
    """What a runner answers.

    Attributes:
        version: Of this schema.
        runner: Its name and version, such as ``caliport-onnx 1``.
        runtime_version: Of the runtime, as it reports it.
        threads: Of the runtime's pool, as used.
        cores: Cores it may run on, as the system tells after pinning.
        load_seconds: From the start of loading until ready.
        peak_bytes: Resident memory at its highest (VmHWM).
        loaded_bytes: The same, right after loading.
        idle_bytes: The same, right before loading.
        answers: One a prompt, in their order.
        turns: Those of ``timing``, in the order they ran.
    """

    version: Literal[1] = VERSION
    runner: Name
    runtime_version: Name
    threads: Some
    cores: tuple[Count, ...]
    load_seconds: Amount
    peak_bytes: Count
    loaded_bytes: Count
    idle_bytes: Count
    answers: tuple[Answer, ...] = ()
    turns: tuple[Turn, ...] = ()


def check_result(result: Result, job: Job, where: str) -> None:
    """Check that a result is an answer to a job, as far as that says.

    The vocabulary is nobody's here; see ``caliport.android_harness.parity``.

    Args:
        result: What a runner wrote.
        job: What it was asked.
        where: What to name in messages.

    Raises:
        InputError: The first thing that is wrong.
    """
    number(result.threads, f"{where}: threads", 1, _CORES, whole=True)
    for core in result.cores:
        number(core, f"{where}: cores", 0, _CORES - 1, whole=True)
    if job.cores and not set(result.cores) <= set(job.cores):
        raise InputError(f"{where}: cores are {shown(result.cores)}, expected {shown(job.cores)}")
    if len(result.answers) != len(job.prompts):
        found, wanted = len(result.answers), len(job.prompts)
        raise InputError(f"{where}: found {found} answers, expected {wanted}")
    for at, answer in enumerate(result.answers):
        for index, row in enumerate(answer.rows):
            _check_row(row, len(answer.rows[0].ids), job.top, f"{where}: answers.{at}.rows.{index}")
    if job.timing is not None:
        _check_turns(result, job.timing, where)


def _check_row(row: Row, size: int, top: int, where: str) -> None:
    ids, logits = row.ids, row.logits
    number(len(ids), f"{where}: number of ids", 1, top, whole=True)
    if not len(ids) == len(logits) == size:
        raise InputError(
            f"{where}: found {len(ids)} ids and {len(logits)} logits, expected {size} of each"
        )
    if len(set(ids)) < size:
        raise InputError(f"{where}: found a token twice in {shown(ids)}, expected each once")
    for value in (*logits, row.mean, row.logsumexp):
        number(value, f"{where}: a logit", -_LARGEST, _LARGEST)
    near = _ROUNDING * max(1.0, abs(logits[0]))
    if list(logits) != sorted(logits, reverse=True) or row.mean > logits[0] + near:
        raise InputError(f"{where}: logits are {shown(logits)}, expected the largest first")
    if row.logsumexp < logits[0] - near:
        raise InputError(
            f"{where}: logsumexp is {row.logsumexp:g}, expected at least {logits[0]:g}, the "
            "largest logit"
        )


def _check_turns(result: Result, timing: Timing, where: str) -> None:
    wanted = sorted(timing.prompt_lengths * timing.repetitions)
    if sorted(turn.prompt_tokens for turn in result.turns) != wanted:
        found = [turn.prompt_tokens for turn in result.turns]
        raise InputError(f"{where}: turns have prompts of {shown(found)}, expected {shown(wanted)}")
    steps = timing.new_tokens - 1
    if any(len(turn.step_seconds) != steps for turn in result.turns):
        raise InputError(f"{where}: expected the times of {steps} tokens in each turn")
    times = [time for t in result.turns for time in (t.first_token_seconds, *t.step_seconds)]
    if min([result.load_seconds, *times]) <= 0:
        raise InputError(f"{where}: found a time of 0 s, expected more")
