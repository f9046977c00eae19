"""Changes of the seeds that examples are made of, and the examples themselves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.judge import Asked
from tests.fuzz.mutate import Pairs, dump
from tests.fuzz.seeds import sign

Change = Callable[[Path], object]


@dataclass(frozen=True)
class Example:
    """A change of the seeds and a command; ``refused`` is False where an answer is right too."""

    what: str
    change: Change
    arguments: Sequence[str]
    refused: bool = True
    writes: Sequence[str] = ("out",)

    def make(self, work: Path) -> Asked:
        """Change a copy of the seeds and say what to ask."""
        self.change(work)
        return Asked(self.arguments, self.what, self.writes, self.refused, fails=True)


def edit(name: str, **changes: Any) -> Change:
    """Set fields of a JSON file; a dot in a name, here ``__``, goes down."""

    def change(work: Path) -> None:
        path = work / name
        found = json.loads(path.read_text())
        for keys, value in changes.items():
            *parents, last = keys.split("__")
            place = found
            for key in parents:
                place = place[int(key) if isinstance(place, list) else key]
            place[last] = value
        path.write_text(dump(found), encoding="utf-8", errors="surrogatepass")

    return change


def signed(change: Change, name: str = "onnx") -> Change:
    def both(work: Path) -> None:
        change(work)
        sign(work / name)

    return both


def write(name: str, text: str) -> Change:
    return lambda work: (work / name).write_text(text, "utf-8", "surrogatepass")


def link_to(name: str, to: str) -> Change:
    def change(work: Path) -> None:
        (work / name).unlink(missing_ok=True)
        (work / name).symlink_to(to)

    return change


def pipe_at(name: str) -> Change:
    def change(work: Path) -> None:
        (work / name).unlink()
        os.mkfifo(work / name)

    return change


def key_twice(name: str, key: str, value: Any) -> Change:
    def change(work: Path) -> None:
        found = json.loads((work / name).read_text())
        (work / name).write_text(dump(Pairs([*found.items(), (key, value)])))

    return change


def index_of(shard: Any) -> Change:
    def change(work: Path) -> None:
        base = work / "base"
        (base / "model.safetensors").rename(base / "moved.safetensors")
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": shard}}
        (base / "model.safetensors.index.json").write_text(dump(index))

    return change


def set_fields(**fields: str) -> Sequence[str]:
    found = [f"{name.replace('__', '.')}={value}" for name, value in fields.items()]
    return [word for text in found for word in ("--set", text)]


def first_line(text: str) -> Change:
    return write("data.jsonl", text + "\n" + '{"input": "a", "output": "b"}\n' * 3)


def data_at(location: str) -> Change:
    def change(work: Path) -> None:
        path = work / "onnx/model.onnx"
        data = path.read_bytes()
        old = b"model.onnx.data"
        assert old in data
        path.write_bytes(data.replace(old, location.encode().ljust(len(old), b"/")[: len(old)]))

    return signed(change)
