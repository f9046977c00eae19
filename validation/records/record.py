"""The kind of record that reports are made of, strict, frozen and finite, and what all name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)

from caliport.core.errors import InputError, printable
from caliport.core.untrusted import parse_json, read_text

RECORD_BYTES = 64 * 2**20
"""Most bytes of a report."""
_LONGEST_NAME = 1000  # characters
_LONGEST_PART = 80  # characters of each name in the place of a field
_MOST = 10**15  # bytes, tokens, seconds; more is nobody's count
_ROUNDING = 1e-6  # of a mean


class Record(BaseModel):
    """A record that refuses unknown fields and numbers that JSON cannot hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _as_name(value: str, info: ValidationInfo) -> str:
    shown = printable(value, _LONGEST_NAME)
    if info.mode == "json" and shown != value:
        raise ValueError(f"expected one printable line of at most {_LONGEST_NAME} characters")
    return shown


Name = Annotated[str, AfterValidator(_as_name)]
"""One printable line: made so where we write it, required where we read it."""
Text = Annotated[str, Field(max_length=100_000)]
"""Words for people. Whoever shows them makes them printable."""
Count = Annotated[int, Field(ge=0, le=_MOST)]
"""A number of things, or of bytes."""
Some = Annotated[int, Field(ge=1, le=_MOST)]
"""At least one thing."""
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Share = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole."""
Points = Annotated[float, Field(ge=-_ROUNDING, le=100 + _ROUNDING)]
"""A mean score, 0 to 100."""
Score = Annotated[float, Field(ge=-_ROUNDING, le=1000)]
"""Of one example; not every metric ends at 100 there."""
Difference = Annotated[float, Field(ge=-100 - _ROUNDING, le=100 + _ROUNDING)]
"""Of two scores."""
Cosine = Annotated[float, Field(ge=-1 - _ROUNDING, le=1 + _ROUNDING)]
Nats = Annotated[float, Field(ge=0, le=1e100)]
"""A loss, a KL, a norm or a distance: what no float32 logits exceed."""
Perplexity = Annotated[float, Field(gt=0, le=1e305)]
Amount = Annotated[float, Field(ge=0, le=_MOST)]
"""Seconds, gigabytes or a ratio."""
Positive = Annotated[float, Field(gt=0, le=_MOST)]
"""What others are divided by: a time that was measured, a rate."""


class Machine(Record):
    """What a result was measured on. Memory in GB (1e9 bytes)."""

    cpu: Text
    cores: Some
    memory_gb: Amount
    os: Text


R = TypeVar("R")


def read_record(kind: type[R], path: Path, writer: str = "caliport") -> R:
    """Read a record back, strictly.

    Args:
        kind: A kind of ``Record``, or a list of one.
        path: Its JSON file.
        writer: What writes such files, for the message.

    Raises:
        InputError: Not a regular file of bounded size, not JSON, a key twice in an object, or a
            field that is wrong, missing or unknown; the first such field is named.
    """
    text = read_text(path, RECORD_BYTES)
    try:
        found = TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}; expected what {writer} writes") from None
    parse_json(text, path, unique=True)
    return found


def first_problem(error: ValidationError) -> str:
    """The first field that is wrong, and how."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(printable(str(part), _LONGEST_PART) for part in first["loc"])
    return f"{where or 'the file'}: {printable(first['msg'])}"


def shown_form(precision: str, bundle: bool) -> str:
    """How an artifact ships, for people."""
    return f"{precision} bundle" if bundle else precision
