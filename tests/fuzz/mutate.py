"""Ways to spoil a valid input. Each takes a ``Random`` and says in a few words what it did."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

SECRET = "SECRET-of-another-directory"
ANSI = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\r\n"


class Raw(str):
    """Text that stands in a document as it is: what no JSON value can say."""


class Pairs(list):
    """An object's names and values, where a name may come twice."""


def dump(value: Any) -> str:
    """JSON of a tree that may hold ``Raw`` and ``Pairs``."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict | Pairs):
        items = value.items() if isinstance(value, dict) else value
        return "{" + ", ".join(f"{json.dumps(str(k))}: {dump(v)}" for k, v in items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


def deep(levels: int, of: str = "[]") -> Raw:
    """A list or an object nested so deep."""
    if of == "[]":
        return Raw("[" * levels + "]" * levels)
    return Raw('{"a": ' * levels + "1" + "}" * levels)


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, -7, 1, 2, 3, 0.5, -0.0, 99999, 2**31, 2**63, 10**18, 10**30),
    *(1e38, 1e300, Raw("1e400"), Raw("-1e400"), Raw("NaN"), Raw("Infinity"), Raw("-Infinity")),
    *(Raw("1" * 5000), Raw("-" + "9" * 400), Raw("0." + "1" * 5000)),
    *("", " ", "x", "LORA\n", "\n", "\t", "\0", ANSI, "[/red]", "[bold]", "{", "%s", "{input}"),
    *("../../outside/secret", "/etc/passwd", "/dev/zero", "..", ".", "/", "~", "a/b", "NaN"),
    *("\ud800", Raw('"\\ud800"'), Raw('"\\udfff\\ud800"'), "\u202e", "\ufeff", "\u2028", "é", "😀"),
    *("(a+)+$", "(", "*", "[", "^(a|a)*$", "true", "1", "-1", "1e5", "1_000", "0x10"),
    *([], {}, [[]], [None], [1, "a", None], {"": None}, [0] * 100, ["x"] * 1000),
    *("y" * 100_000, "z" * 1_000_000, ["x"] * 100_000, Raw("[" + "0," * 500_000 + "0]")),
    *(deep(70), deep(1000), deep(100_000), deep(200, "{}"), deep(50_000, "{}")),
)


def value(draw: Random, like: Any = None) -> Any:
    """A value that hardly anything expects; or one near to what stands there."""
    if draw.random() < 0.3:
        if isinstance(like, bool):
            return draw.choice([not like, int(like), str(like)])
        if isinstance(like, int | float):
            near = [-like, like + 1, like * 1000, like + 0.5, str(like), [like], like * 10**9]
            return draw.choice(near)
        if isinstance(like, str):
            long, cut = like * 1000, like[: len(like) // 2]
            return draw.choice([like + "\n", like + ANSI, [like], {like: like}, long, cut])
        if isinstance(like, list | tuple):
            return draw.choice(
                [like[1:], [*like, *like], [*like, None], like[:1], dict.fromkeys("ab")]
            )
        if isinstance(like, dict):
            return draw.choice([list(like), list(like.values()), str(like), {}])
    return draw.choice(VALUES)


def tree(draw: Random, root: Any) -> tuple[Any, str]:
    """Change one place of a JSON tree; returns the new tree and what was done."""
    if draw.random() < 0.04:
        found = value(draw, root)
        return found, f"all: {brief(found)}"
    return _inside(draw, root, "")


def _inside(draw: Random, node: Any, path: str) -> tuple[Any, str]:
    if isinstance(node, dict) and node:
        name = draw.choice(list(node))
        if draw.random() < _deeper(node[name]):
            new, did = _inside(draw, node[name], f"{path}.{name}"[-80:])
            return {**node, name: new}, did
        return _object(draw, node, name, path)
    if isinstance(node, list) and node:
        at = draw.randrange(len(node))
        if draw.random() < _deeper(node[at]):
            new, did = _inside(draw, node[at], f"{path}[{at}]")
            return [*node[:at], new, *node[at + 1 :]], did
        new = value(draw, node[at])
        how = draw.randrange(3)
        if how == 0:
            return [*node[:at], new, *node[at + 1 :]], f"{path}[{at}] = {brief(new)}"
        if how == 1:
            return [*node[:at], new, *node[at:]], f"{path}[{at}] + {brief(new)}"
        return [*node[:at], *node[at + 1 :]], f"{path}[{at}] gone"
    new = value(draw, node)
    return new, f"{path} = {brief(new)}"


def _deeper(node: Any) -> float:
    return 0.75 if isinstance(node, dict | list) and node else 0


def _object(draw: Random, node: dict[str, Any], name: str, path: str) -> tuple[Any, str]:
    how, at = draw.random(), f"{path}.{name}"[-80:]
    if how < 0.62:
        new = value(draw, node[name])
        return {**node, name: new}, f"{at} = {brief(new)}"
    rest = {key: kept for key, kept in node.items() if key != name}
    if how < 0.74:
        return rest, f"{at} gone"
    if how < 0.86:
        key = draw.choice(
            ["x", "", ANSI, "[/red]", "k" * 1_000_000, "../../pwn", name + " ", "\u202e"]
        )
        if draw.random() < 0.5:
            return {**rest, key: node[name]}, f"{at} renamed {key[:12]!r}"
        return {**node, key: value(draw)}, f"{path} + {key[:12]!r}"
    if how < 0.93:
        new = value(draw, node[name])
        return Pairs([*node.items(), (name, new)]), f"{at} twice, then {brief(new)}"
    other = draw.choice(list(node))
    return {**node, name: node[other], other: node[name]}, f"{at} and {other} swapped"


def brief(found: object) -> str:
    """What to call a value in a line."""
    text = repr(found)
    return text if len(text) < 60 else f"{text[:40]}… of {len(text)}"


def spoil_bytes(draw: Random, data: bytes) -> tuple[bytes, str]:
    """Cut, flip, fill or replace bytes."""
    how, at = draw.randrange(9), draw.randrange(len(data) + 1)
    if how == 0:
        return data[:at], f"cut to {at}"
    if how in (1, 2):
        changed, count = bytearray(data), draw.choice([1, 1, 4, 64])
        for _ in range(count if data else 0):
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(changed), f"{count} bits flipped"
    if how == 3:
        return b"", "empty"
    if how == 4:
        return draw.randbytes(draw.choice([1, 100, 10_000])), "random bytes"
    if how == 5:
        return data + draw.choice([b"\0", b"x", draw.randbytes(1000), data]), "more at the end"
    if how == 6:
        size = min(len(data) - at, 64)
        return data[:at] + b"\xff" * size + data[at + size :], f"{size} bytes of 255 at {at}"
    if how == 7:
        return data[at:], f"starts at {at}"
    return draw.choice([b"\xef\xbb\xbf" + data, data.decode("latin-1").encode("utf-16")]), "recoded"


def spoil_kind(draw: Random, path: Path, outside: Path) -> str:
    """Put something that is not a plain file, or is a very large one, in a file's place."""
    path.unlink()
    how = draw.choice(KINDS)
    if how == "directory":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "sparse":
        with path.open("wb") as stream:
            stream.truncate(20 * 2**30)
    elif how == "secret":
        path.symlink_to(outside / "secret")
    elif how != "gone":
        path.symlink_to({"dangling": "nowhere", "loop": path.name}.get(how, f"/dev/{how}"))
    return how


KINDS = ("gone", "directory", "pipe", "sparse", "secret", "dangling", "loop", "zero", "urandom")
KINDS += ("null", "tty")

TEXTS = (
    "",
    " ",
    "\0",
    "nul",
    "null",
    "[]",
    '""',
    "0",
    "{",
    '{"a": 1} {"a": 2}',
    "{} x",
    str(deep(100_000)),
    str(deep(100_000, "{}")),
    "[" * 100_000,
    '"' + "a" * 5_000_000 + '"',
    "9" * 100_000,
    "\ufeff{}",
    "// no\n{}",
    "{'a': 1}",
    ANSI,
)
"""Documents that are no JSON, or not what anyone expects."""


def spoil_json(draw: Random, path: Path, outside: Path) -> str:
    """Spoil a JSON file: most often one place of its tree."""
    how = draw.random()
    if how < 0.74:
        new, did = tree(draw, json.loads(path.read_text()))
        path.write_text(dump(new), encoding="utf-8", errors="surrogatepass")
        return did
    return _otherwise(draw, path, outside, TEXTS)


def _otherwise(draw: Random, path: Path, outside: Path, texts: tuple[str, ...]) -> str:
    how = draw.randrange(5)
    if how < 2:
        changed, did = spoil_bytes(draw, path.read_bytes())
        path.write_bytes(changed)
        return did
    if how < 4:
        return spoil_kind(draw, path, outside)
    text = draw.choice(texts)
    path.write_text(text, encoding="utf-8")
    return f"is {text[:20]!r}"


def spoil_plain(draw: Random, path: Path, outside: Path) -> str:
    """Spoil a file of which nothing is known."""
    if draw.random() < 0.75:
        changed, did = spoil_bytes(draw, path.read_bytes())
        path.write_bytes(changed)
        return did
    return spoil_kind(draw, path, outside)


def spoil_text(*texts: str) -> Callable[[Random, Path, Path], str]:
    """A way to spoil a text file: most often by putting one of some texts in its place."""

    def spoil(draw: Random, path: Path, outside: Path) -> str:
        if draw.random() < 0.75:
            text = draw.choice(texts)
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
            return f"is {text[:60]!r}"
        return _otherwise(draw, path, outside, texts)

    return spoil


def spoil_lines(draw: Random, path: Path, outside: Path) -> str:
    """Spoil a file of JSON lines."""
    how, lines = draw.random(), path.read_text().splitlines()
    if how > 0.85:
        return _otherwise(draw, path, outside, TEXTS)
    at = draw.randrange(len(lines))
    if how < 0.7:
        new, did = tree(draw, json.loads(lines[at]))
        lines[at] = dump(new)
    else:
        lines[at] = draw.choice(
            [*TEXTS, "{}", '{"input": "a"}', '{"output": "a"}', "a" * 5_000_000]
        )
        did = f"is {lines[at][:20]!r}"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    return f"line {at + 1} {did}"


def spoil_tensors(draw: Random, path: Path, outside: Path) -> str:
    """Spoil a safetensors file: its header, its numbers, its bytes."""
    how = draw.random()
    if how < 0.3:
        return spoil_plain(draw, path, outside)
    header, body = read_tensors(path)
    if how < 0.6:
        new, did = tree(draw, header)
        write_tensors(path, new, body)
        return f"header {did}"
    if how < 0.7:
        size = draw.choice([0, 1, 7, 10**6, 2**31, 2**63 - 1, 2**64 - 1])
        path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
        return f"header of {size}"
    name = draw.choice([key for key in header if key != "__metadata__"])
    facts = header[name]
    if how < 0.85:
        start, end = facts["data_offsets"]
        number = draw.choice([np.nan, np.inf, -np.inf, 3e38, 1e30])
        data = np.frombuffer(body, np.uint8).copy()
        values = data[start:end].view(np.float32)
        values[draw.randrange(len(values))] = number
        if draw.random() < 0.3:
            values[:] = number
        write_tensors(path, header, data.tobytes())
        return f"{name} has {number}"
    edits: list[dict[str, Any]] = [
        {"dtype": draw.choice(["F16", "BF16", "F64", "I8", "F8_E4M3", "BOOL", "F4", "x"])},
        {
            "shape": draw.choice(
                [[2**40, 2**40], [-1], [], [0], [30_000, 30_000], facts["shape"][::-1]]
            )
        },
        {"data_offsets": draw.choice([[0, 0], [4, 0], [0, 2**62], [-4, 4], [0, 4]])},
    ]
    edit = draw.choice(edits)
    write_tensors(path, {**header, name: {**facts, **edit}}, body)
    return f"{name} {edit}"


def read_tensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the bytes after it."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_tensors(path: Path, header: Any, body: bytes) -> None:
    """A safetensors file with a header that need not fit."""
    text = dump(header).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
