"""By kind: what is spoiled, and which commands read it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

import yaml

from tests.fuzz.flags import flags
from tests.fuzz.judge import Asked
from tests.fuzz.mutate import (
    ANSI,
    deep,
    dump,
    spoil_bytes,
    spoil_json,
    spoil_kind,
    spoil_lines,
    spoil_plain,
    spoil_tensors,
    spoil_text,
    tree,
)
from tests.fuzz.seeds import BASE, BOTH, DATA, sign

Make = Callable[[Random, Path], Asked]
"""Spoils something in a copy of the seeds and returns what to ask."""
Spoil = Callable[[Random, Path, Path], str]

EXPORT = ("export", *BASE, "--runtime", "onnx", "--out", "out")
MERGES = ("linear", "exact", "ties", "dare-linear", "dare-ties", "magnitude-prune", "svd", "cat")

TEMPLATES = (
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "{{ [0] * 10**9 }}",
    "{{ 'a' * 10**10 }}",
    "{% set x = 'aaaaaaaaaa' %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}",
    "{{ lipsum(n=10**6) }}",
    "{{ lipsum() }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
    "{{ self._TemplateReference__context }}",
    "{{ raise_exception('no " + ANSI + "') }}",
    "{{ messages[99]['content'] }}",
    "{{ messages[0].content.nothing.more }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ 'x' | center(10**10) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% for",
    "{{ unknown }}{{ unknown.field }}",
    "{{ 1 / 0 }}",
    "{{ messages | tojson | length / 0 }}",
    "{{ strftime_now('%" + "Y" * 1000 + "') }}",
    "{{ strftime_now(1) }}",
    "{{ namespace(a=1).a.b.c() }}",
    "{{ range(10**7) | list | sort | join }}",
    "constant",
    "",
    "\x00",
    "\ufffe",
    "{{ messages }}" * 100_000,
    "(" * 5000,
    "{{" + "(" * 5000 + ")" * 5000 + "}}",
    "{% if true %}" * 1000 + "{% endif %}" * 1000,
    "{{ messages[0]['content'] }}" + "\u202e" + ANSI,
)
YAMLS = (
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{n}: &{n} [{f'*{p},' * 9}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True))
    + "name: *i\n",
    "name: !!python/object/apply:os.system ['touch owned']",
    "name: !!python/name:os.system",
    "? [a, b]\n: 1",
    "yes: 1",
    "1: 2",
    "null: 3",
    "2020-01-01: 3",
    "name: tiny\nname: other",
    "<<: *gone",
    "<<: {a: 1}",
    "a: &a\n  b: *a",
    "- " * 5000 + "x",
    "a: " * 50 + "x",
    "---\na: 1\n---\nb: 2",
    "\t- a",
    "%YAML 9.9\n---\na: 1",
    "name: " + "9" * 5000,
    "name: 0x" + "f" * 10_000,
    "name: 1:2:3:4:5:6:7:8" + ":59" * 3000,
    "seed: .inf",
    "seed: .nan",
    "name: 99999-99-99",
    "name: 2001-13-45 99:99:99",
    "name: !!binary x",
    "name: !!set {a, b}",
    "name: !!float abc",
    "name: !!int ''",
    "name: !!timestamp x",
    "name: !!bool x",
    str(deep(20_000)),
    "a" * 5_000_000,
    "x: " + "|" + "\n  " + "b" * 5_000_000,
    "'",
    "@",
    "\x1b[31m: 1",
    '"\\ud800": 1',
    "#" * 100_000,
)


def _spoiled(draw: Random, directory: Path, ways: Mapping[str, Spoil]) -> str:
    """Spoil one file of a directory."""
    name = draw.choice([name for name in ways if (directory / name).is_file()])
    outside = directory
    while outside.name != "work":
        outside = outside.parent
    return (
        f"{directory.name}/{name}: {ways[name](draw, directory / name, outside.parent / 'outside')}"
    )


_ADAPTER = {"adapter_config.json": spoil_json, "adapter_model.safetensors": spoil_tensors}
_BASE = {
    "config.json": spoil_json,
    "model.safetensors": spoil_tensors,
    "generation_config.json": spoil_json,
}
_TOKENIZER = {
    "tokenizer.json": spoil_json,
    "tokenizer_config.json": spoil_json,
    "chat_template.jinja": spoil_text(*TEMPLATES),
}
_ONNX = {
    "model.onnx": spoil_plain,
    "model.onnx.data": spoil_plain,
    "genai_config.json": spoil_json,
    "tokenizer.json": spoil_json,
    "tokenizer_config.json": spoil_json,
    "chat_template.jinja": spoil_text(*TEMPLATES),
    "manifest.json": spoil_json,
    "one.onnx_adapter": spoil_plain,
}
_PTE = {"model.pte": spoil_plain, **{n: w for n, w in _ONNX.items() if "onnx" not in n}}


def adapter(draw: Random, work: Path) -> Asked:
    what = _spoiled(draw, work / "second", _ADAPTER)
    if draw.random() < 0.1:
        what += "; " + _spoiled(draw, work / "first", {"adapter_config.json": spoil_json})
    merge = ("calibrate", *BOTH, "--method", draw.choice(MERGES), "--out", "out")
    commands: list[tuple[str, ...]] = [
        ("audit", "first", "second"),
        ("audit", "first", "second", "--out", "out"),
        *([merge] * 4),
        ("calibrate", *BOTH, "--method", "lc", *DATA, "--out", "out"),
        (*EXPORT, "--adapter", "second"),
        (*EXPORT, "--bundle", "one=second"),
        ("sensitivity", *BASE, "--adapter", "second"),
    ]
    return Asked(draw.choice(commands), what)


def _of_base(draw: Random) -> tuple[str, ...]:
    return draw.choice(
        [
            *([EXPORT] * 3),
            (*EXPORT, "--precision", draw.choice(["int8", "int4"])),
            (*EXPORT, "--adapter", "first"),
            ("calibrate", *BOTH, "--method", "linear", "--out", "out"),
            ("calibrate", *BOTH, "--method", "lc", *DATA, "--out", "out"),
            ("sensitivity", *BASE),
        ]
    )


def base(draw: Random, work: Path) -> Asked:
    return Asked(_of_base(draw), _spoiled(draw, work / "base", _BASE))


def gguf(draw: Random, work: Path) -> Asked:
    path = work / "tiny.gguf"
    data, header = path.read_bytes(), 1000  # bytes, in which most settings lie
    if draw.random() < 0.5:
        changed, what = spoil_bytes(draw, data[:header])
        path.write_bytes(changed + data[header:])
    else:
        what = spoil_plain(draw, path, work.parent / "outside")
    command = draw.choice([EXPORT, ("calibrate", *BOTH, "--method", "linear", "--out", "out")])
    return Asked([path.name if word == "base" else word for word in command], what)


def tokenizer(draw: Random, work: Path) -> Asked:
    return Asked(_of_base(draw), _spoiled(draw, work / "base", _TOKENIZER))


def _artifact(draw: Random, work: Path, name: str, ways: Mapping[str, Spoil]) -> Asked:
    what = _spoiled(draw, work / name, ways)
    if draw.random() < 0.9 and "manifest" not in what:
        sign(work / name)
        what += ", signed"
    adapter = ("--bundle", "one=first") if name == "bundle" else ("--adapter", "first")
    quick = ("--prompt-tokens", "4", "--new-tokens", "2", "--repetitions", "1", "--threads", "1")
    check = ("validate", name, *BASE, *adapter, "--no-latency")
    commands = [("bench", name, *quick), (*check, "--out", "out"), check]
    if name == "bundle":
        commands.append(("export", "--into", name, "--bundle", "two=second"))
    arguments = draw.choice(commands)
    fails = arguments[0] == "validate"
    return Asked(arguments, what, ("out", name) if "--into" in arguments else ("out",), fails=fails)


def onnx(draw: Random, work: Path) -> Asked:
    return _artifact(draw, work, "onnx", _ONNX)


def bundle(draw: Random, work: Path) -> Asked:
    return _artifact(draw, work, "bundle", _ONNX)


def pte(draw: Random, work: Path) -> Asked:
    return _artifact(draw, work, "pte", _PTE)


def lines(draw: Random, work: Path) -> Asked:
    what = _spoiled(draw, work, {"data.jsonl": spoil_lines})
    flix = ("calibrate", *BASE, "--method", "flix", *DATA, "--rank", "x=2", "--out", "out")
    commands: list[tuple[str, ...]] = [
        ("calibrate", *BOTH, "--method", draw.choice(["lc", "lc++"]), *DATA, "--out", "out"),
        ("calibrate", *BOTH, "--method", "lc", *DATA, "--prompt", "Say {input}", "--out", "out"),
        flix,
        ("sensitivity", *BASE, "--prompts", "data.jsonl"),
        (
            "validate",
            "onnx",
            *BASE,
            "--adapter",
            "first",
            "--no-latency",
            "--prompts",
            "data.jsonl",
        ),
    ]
    return Asked(draw.choice(commands), what, fails=True)


def recipe(draw: Random, work: Path) -> Asked:
    path = work / "recipe.yaml"
    if draw.random() < 0.75:
        new, what = tree(draw, yaml.safe_load(path.read_text()))
        text = dump(new).replace("NaN", ".nan").replace("Infinity", ".inf")
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
    elif draw.random() < 0.2:
        changed, what = spoil_bytes(draw, path.read_bytes())
        path.write_bytes(changed)
    elif draw.random() < 0.2:
        what = spoil_kind(draw, path, work / "nowhere")
    else:
        text = draw.choice(YAMLS)
        whole = path.read_text() if draw.random() < 0.5 else ""
        path.write_text(whole + text, encoding="utf-8")
        what = f"{'then ' * bool(whole)}{text[:40]!r}"
    command = draw.choice([("report",), ("run",), ("validate", "--no-latency")])
    return Asked([command[0], "recipe.yaml", *command[1:]], what, ("runs",), fails=True)


def reports(draw: Random, work: Path) -> Asked:
    made = work / "runs/tiny/reports"
    what = _spoiled(draw, made, {path.name: spoil_json for path in sorted(made.glob("*.json"))})
    commands = [
        ["report", "runs/tiny"],
        ["compare", "sound", "runs/tiny"],
        ["compare", "runs/tiny", "sound", "--out", "out/compare.html"],
        ["baseline", "store", "runs/tiny", "out/b.json"],
    ]
    arguments = draw.choice(commands)
    return Asked(arguments, what, ("out", "runs/tiny/reports"))


def baseline(draw: Random, work: Path) -> Asked:
    what = _spoiled(draw, work, {"baseline.json": spoil_json})
    check = ["validate", "onnx", *BASE, "--adapter", "first", "--baseline", "baseline.json"]
    arguments = draw.choice([["baseline", "show", "baseline.json"], check])
    return Asked(arguments, what, fails=True)


def device(draw: Random, work: Path) -> Asked:
    name = draw.choice(["facts.txt", "result.json", "job.json", "llama.txt"])
    path = work / name
    if name == "job.json":
        what = spoil_json(draw, path, work.parent / "outside")
    elif name == "result.json":
        new, what = tree(draw, json.loads(path.read_text()))
        path.write_text(dump(new), encoding="utf-8", errors="surrogatepass")
    elif draw.random() < 0.3:
        changed, what = spoil_bytes(draw, path.read_bytes())
        path.write_bytes(changed)
    else:
        words = path.read_text().split(" ")
        at = draw.randrange(len(words))
        new = draw.choice(
            ["", "-1", "9" * 5000, "-" * 9, ANSI, "x" * 10**6, "1e400", "NaN", "0-99999999999"]
        )
        path.write_text(" ".join([*words[:at], new, *words[at + 1 :]]))
        what = f"word {at}, {words[at]!r} = {new[:20]!r}"
    return Asked([f"@{path.stem}", name], f"{name}: {what}")


MAKES: dict[str, Make] = {
    "adapter": adapter,
    "base": base,
    "gguf": gguf,
    "tokenizer": tokenizer,
    "onnx": onnx,
    "bundle": bundle,
    "pte": pte,
    "lines": lines,
    "recipe": recipe,
    "reports": reports,
    "baseline": baseline,
    "device": device,
    "flags": flags,
}
"""Every kind. A case is a kind and a number, the seed of its ``Random``."""
