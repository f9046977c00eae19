"""Two validations of one artifact on one machine say the same, but for the times."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from commands import caliport

from caliport.core.checkpoints import encode_prompt, load_tokenizer
from tests.exports import to_executorch, to_onnx
from tests.forking import forked
from tests.sampling import thorough

EXAMPLES = [
    {"input": "Anna and Tom meet in the park.", "output": "Anna y Tom quedan."},
    {"input": "tennis on Friday", "output": "tenis el viernes"},
    {"input": "grüße", "output": "saludos"},
]


def without_times(report: Any) -> Any:
    """The same JSON without ``seconds``, wherever it is."""
    if isinstance(report, dict):
        return {k: without_times(v) for k, v in report.items() if k != "seconds"}
    return [without_times(v) for v in report] if isinstance(report, list) else report


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnx", thorough("executorch")])
def test_the_same_verdict_and_json(
    runtime: str, one_layer: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """One is a process of its own, so the order of hashes differs from that of the forked one."""
    base_dir, adapter_dirs = one_layer
    make = to_onnx if runtime == "onnx" else to_executorch
    make(base_dir, tmp_path / "art", adapter=adapter_dirs[0], precision="int8")
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)))
    flags = ["--base", base_dir, "--adapter", adapter_dirs[0], "--prompts", "e.jsonl"]
    codes, texts = [], []
    for out, run in (("one", forked), ("two", caliport)):
        ran = run(
            "validate", "art", *flags, "--threads", 2, "--no-latency", "--out", out, cwd=tmp_path
        )
        assert ran.returncode in (0, 1), ran.stderr
        codes.append(ran.returncode)
        texts.append(json.loads((tmp_path / out / "parity.json").read_text()))
    assert codes[0] == codes[1]
    assert without_times(texts[0]) == without_times(texts[1])
    assert (tmp_path / "one/summary.md").read_text() == (tmp_path / "two/summary.md").read_text()
    (artifact,) = texts[0]["artifacts"]
    assert len(artifact["task"]["artifact_scores"]) == len(EXAMPLES)
    tokenizer = load_tokenizer(base_dir)
    prompts = [encode_prompt(tokenizer, example["input"]) for example in EXAMPLES]
    assert artifact["asked"]["prompts"] == hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    assert artifact["asked"]["sampling"] == "greedy"
    assert artifact["asked"]["seeds"].keys() == {"built-in prompts", "probes", "bootstrap"}
