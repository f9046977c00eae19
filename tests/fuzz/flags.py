"""Flags with values that nobody means."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

from tests.fuzz.judge import Asked
from tests.fuzz.mutate import ANSI
from tests.fuzz.seeds import BOTH, DATA

TEXTS = (
    *("", " ", "a", "a\nb", "\n", ANSI, "[/red]", "x" * 5000, "y" * 100_000, "\udcff", "\u202e"),
    *("nan", "inf", "-inf", "-1", "0", "1", "0.5", "1e400", "1e38", "9" * 5000, "2147483648"),
    *("99999999999999999999", "1_0", "0x10", "True", "None", "null", "{input}", "{", "{0}", "%s"),
    *("..", ".", "~", "a/b/../../../c", "/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem"),
    *("=", "a=", "=a", "a=b=c", "one=first", "../x=first", "a/b=first", "x=1e9", "x=0", "x=-1"),
    *("--", "-", "-x", "--help", "base", "first", "data.jsonl", "recipe.yaml", "onnx", "runs"),
    *("lora.rank=", "seed=x", "a.b.c=1", "name=../../pwn", "=1", "seed=[", "data=null", "name.x=1"),
)
_EXPORT = ("export", "--base", "base", "--runtime", "onnx", "--out", "out")
_BENCH = ("bench", "onnx", "--prompt-tokens", "4", "--new-tokens", "2", "--repetitions", "1")
_CHECK = ("validate", "onnx", "--base", "base", "--adapter", "first", "--no-latency")
COMMANDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("calibrate", *BOTH, "--method", "linear", "--out", "out"),
        ("--weight", "--method", "--out", "--base", "--adapter", "--seed", "--runs"),
    ),
    (
        ("calibrate", *BOTH, "--method", "lc", *DATA, "--out", "out"),
        ("--prompt", "--learning-rate", "--batch-size", "--seed", "--data", "--rank", "--features"),
    ),
    (
        (
            "calibrate",
            "--base",
            "base",
            "--method",
            "flix",
            *DATA,
            "--rank",
            "x=2",
            "--out",
            "out",
        ),
        ("--rank", "--features", "--prompt", "--data", "--learning-rate"),
    ),
    (
        _EXPORT,
        (
            *(
                "--base",
                "--adapter",
                "--runtime",
                "--precision",
                "--context",
                "--bundle",
                "--share",
            ),
            *("--into", "--int8-layer", "--embedding-bits", "--cache-bits", "--out", "--runs"),
            *("--push-to-hub",),
        ),
    ),
    ((*_EXPORT, "--precision", "int4"), ("--int8-layer", "--embedding-bits", "--adapter")),
    ((*_EXPORT, "--bundle", "one=first"), ("--bundle", "--share")),
    (("audit", "first", "second"), ("--weight", "--out", "")),
    (
        ("sensitivity", "--base", "base"),
        ("--share", "--prompts", "--prompt", "--adapter", "--out", "--base"),
    ),
    (
        (*_BENCH, "--threads", "1"),
        ("--prompt-tokens", "--new-tokens", "--threads", "--out", "--core", "--length", ""),
    ),
    (
        _CHECK,
        (
            *(
                "--prompts",
                "--prompt",
                "--threads",
                "--precision",
                "--against",
                "--runner",
                "--out",
            ),
            *("--against-runner", "--baseline", "--bundle", "--share", "--base", "--adapter"),
        ),
    ),
    (("report", "runs/tiny"), ("", "--set", "--runs")),
    (("run", "recipe.yaml"), ("--set", "--runs", "--baseline")),
    (("validate", "recipe.yaml", "--no-latency"), ("--set", "--runs", "--baseline", "--runner")),
    (("compare", "sound", "runs/tiny"), ("--out", "")),
    (("baseline", "store", "runs/tiny", "out.json"), ("",)),
    (("baseline", "show", "baseline.json"), ("",)),
    (("init", "out.yaml"), ("--recipe", "")),
    (("devices",), ("--connect", "")),
)
"""Each with flags that it takes; an empty one stands for an argument."""


def flags(draw: Random, work: Path) -> Asked:
    """A command with one flag's value, or one argument, replaced or added."""
    command, names = draw.choice(COMMANDS)
    arguments, name, text = list(command), draw.choice(names), draw.choice(TEXTS)
    if name == "":
        places = [i for i, a in enumerate(arguments) if i and not a.startswith("-")]
        at = draw.choice([*places, len(arguments)])
        arguments[at : at + 1] = [text]
    elif name in arguments:
        arguments[arguments.index(name) + 1] = text
    else:
        arguments += [name, text] if draw.random() < 0.8 else [f"{name}={text}"]
    what = f"{name} {text[:40]!r}"
    writes = ("out", "out.json", "out.yaml", "runs", "compare.html", "recipe.yaml")
    asked_for = arguments[0] in ("init", "baseline") or name in ("--out", "--runs")
    written = (os.path.normpath(text),) if text and asked_for else ()
    return Asked(arguments, what, (*writes, *written), fails=True)
