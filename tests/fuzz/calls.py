"""What no command reads from a file: the words of a device and of the programs on it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

FACTS = """caliport-fact ro.product.cpu.abi
arm64-v8a
caliport-fact ro.build.version.release
15
caliport-fact ro.product.manufacturer
Example
caliport-fact ro.product.model
Phone
caliport-fact ro.kernel.qemu

caliport-fact ro.boot.qemu

caliport-fact machine
aarch64
caliport-fact cores
0-7
caliport-fact cpuinfo
Features	: fp asimd aes asimddp i8mm
caliport-fact meminfo
MemTotal:        8000000 kB
MemAvailable:    4000000 kB
caliport-fact space
Filesystem     1K-blocks     Used Available Use% Mounted on
/dev/block     100000000 50000000  50000000  50% /data
caliport-fact battery
  level: 85
  temperature: 273
caliport-fact thermal
Thermal Status: 1
caliport-fact board

"""
ROW = {"ids": [2, 1], "logits": [1.0, 0.5], "mean": 0.1, "logsumexp": 2.5}
RESULT = {
    "version": 1,
    "runner": "caliport-onnx 1",
    "runtime_version": "1.31.0",
    "threads": 1,
    "cores": [0, 1],
    "load_seconds": 0.5,
    "peak_bytes": 300,
    "loaded_bytes": 200,
    "idle_bytes": 100,
    "answers": [{"tokens": [3, 4], "rows": [ROW, ROW]}],
    "turns": [{"prompt_tokens": 4, "first_token_seconds": 0.1, "step_seconds": [0.01, 0.02]}],
}
JOB = {
    "version": 1,
    "runtime": "executorch",
    "directory": "pte",
    "adapter": None,
    "threads": 1,
    "cores": [min(os.sched_getaffinity(0))],
    "ends": [2],
    "max_new_tokens": 3,
    "top": 2,
    "prompts": [{"tokens": [1, 2, 3], "targets": [4, 5], "write": True}],
    "timing": {"prompt_lengths": [4], "new_tokens": 3, "warmup": 0, "repetitions": 1},
}
FIGURES = {
    "prompt_tokens": 4,
    "generated_tokens": 2,
    "model_load_start_ms": 0,
    "model_load_end_ms": 50,
    "inference_start_ms": 51,
    "inference_end_ms": 99,
    "first_token_ms": 70,
    "SCALING_FACTOR_UNITS_PER_SECOND": 1000,
}


def facts(path: str) -> None:
    """What a device says of itself."""
    from caliport.android_harness.device.facts import facts as read
    from caliport.cli.on_device.devices import _show

    said = Path(path).read_bytes().decode("utf-8", "replace")
    device = SimpleNamespace(serial="0123", script=lambda *_, **__: SimpleNamespace(out=said))
    _show([read(cast(Any, device))])


def result(path: str) -> None:
    """What a runner on a device wrote."""
    from caliport.android_harness import parity, run

    text = Path(path).read_bytes().decode("utf-8", "replace")
    device = SimpleNamespace(serial="0123")
    held = SimpleNamespace(device=device, read=lambda _: text)
    job = SimpleNamespace(prompts=[0], threads=1, cores=(0, 1), top=2, timing=None)
    done = SimpleNamespace(code=0, err="", out="")
    found = run._result(cast(Any, held), cast(Any, job), cast(Any, done))
    logits = [np.linspace(-1, 1, 10, dtype=np.float32).reshape(2, 5)]
    ran = SimpleNamespace(result=found, device=device)
    parity._check_rows(cast(Any, ran), cast(Any, SimpleNamespace(logits=logits)))
    for rows, said in zip(logits, found.answers, strict=True):
        if not np.isfinite(parity.estimated(rows, said.rows)[:, list(said.rows[0].ids)]).all():
            raise ArithmeticError("logits of a result are not finite")


def job(path: str) -> None:
    """What a runner on a device is asked."""
    from caliport.android_harness.runners.executorch_python import read_job, run_job

    run_job(read_job(Path(path)))


def llama(path: str) -> None:
    """What ``llama_main`` printed."""
    from caliport.android_harness.runners.executorch import parse_llama_main

    parse_llama_main(Path(path).read_bytes().decode("utf-8", "replace"), "prompt")


def write_words(work: Path) -> None:
    """Write valid words of each kind into a directory."""
    (work / "facts.txt").write_text(FACTS)
    (work / "result.json").write_text(json.dumps(RESULT))
    (work / "job.json").write_text(json.dumps(JOB))
    (work / "llama.txt").write_text(f"prompt text\nPyTorchObserver {json.dumps(FIGURES)}\n")
