"""The kind of record that reports are made of, strict, frozen and finite, and what all name."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A record that refuses unknown fields and numbers that JSON cannot hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Machine(Record):
    """What a result was measured on. Memory in GB (1e9 bytes)."""

    cpu: str
    cores: int
    memory_gb: float
    os: str


def shown_form(precision: str, bundle: bool) -> str:
    """How an artifact ships, for people."""
    return f"{precision} bundle" if bundle else precision
