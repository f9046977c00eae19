"""The benchmark of int4 by tool: rows, commands, records, tables and plot; no tool is run here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quantization import plot, rates
from benchmarks.quantization.llama import LlamaRunner
from benchmarks.quantization.peers import TOOLS, Request, interpreter
from benchmarks.quantization.records import part, read, write
from benchmarks.quantization.rows import BASELINES, ROWS
from benchmarks.quantization.table import render
from benchmarks.quantization.texts import calibration
from caliport.core.errors import InputError


def request_for(name: str, root: Path) -> Request:
    paths = [root / part for part in ("base.gguf", "base", "text.jsonl")]
    return Request(ROWS[name], *paths, 64, root / name, root / "work", "python")


def test_rows_are_of_known_tools_and_runtimes(tmp_path: Path) -> None:
    for name, row in ROWS.items():
        assert row.tool in TOOLS, name
        assert row.runtime in BASELINES, name
        if row.tool != "export-llm":  # which reads a converted checkpoint
            command = TOOLS[row.tool].command(request_for(name, tmp_path))
            assert set(row.options) <= set(command) or row.tool == "olive", name
    assert set(BASELINES.values()) <= set(ROWS)


def test_only_rows_with_text_are_calibrated(tmp_path: Path) -> None:
    for name, text in (("hqq", False), ("gptq", True), ("int8", False), ("pte-gptq", True)):
        command = TOOLS["caliport"].command(request_for(name, tmp_path))
        assert ("--calibration" in command) is text


def test_llama_needs_a_gguf(tmp_path: Path) -> None:
    good = request_for("q4_0", tmp_path)
    TOOLS["llama.cpp"].prepare(good)
    assert good.artifact.is_dir()
    odd = Request(ROWS["q4_0"], tmp_path, tmp_path, tmp_path, 64, tmp_path, tmp_path, "python")
    with pytest.raises(InputError, match=r"needs the \.gguf file"):
        TOOLS["llama.cpp"].prepare(odd)


def test_missing_environments_are_named(tmp_path: Path) -> None:
    assert interpreter("caliport", tmp_path) == sys.executable
    with pytest.raises(InputError, match="no environment for olive"):
        interpreter("olive", tmp_path)


def test_parts_are_kept_until_their_settings_change(tmp_path: Path) -> None:
    record = tmp_path / "row.json"
    assert part(record, "export", {"a": [1]}, lambda: {"bytes": 1})
    assert part(record, "runtime", {"a": [1]}, lambda: {"kl": 0.5})
    assert not part(record, "export", {"a": [1]}, lambda: pytest.fail("measured again"))
    assert part(record, "export", {"a": [2]}, lambda: {"bytes": 2})
    assert read(record)["export"] == {"key": {"a": [2]}, "bytes": 2}
    assert read(record)["runtime"]["kl"] == 0.5


def test_calibration_text_is_not_measured(tmp_path: Path) -> None:
    rows = [{"dialogue": "a", "summary": "b"}, {"dialogue": "c", "summary": "d"}]
    (tmp_path / "dialogsum").mkdir()
    dev = tmp_path / "dialogsum" / "dialogsum.dev.jsonl"
    dev.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    lines = calibration(tmp_path, tmp_path / "text.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["output"] for line in lines] == ["b", "d"]


def distance(kl: float) -> dict[str, float]:
    return {"kl": kl, "top1": 0.8, "perplexity": 1.1, "tokens": 1000.0}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of three rows, and one that failed."""
    for name, size, kl in (("fp32", 500e6, 0.0), ("hqq", 80e6, 0.4), ("q4_0", 90e6, 0.2)):
        found: dict[str, Any] = {
            "export": {"seconds": 10.0, "peak_bytes": 2e9, "bytes": size},
            "weights": {"dialogues": distance(kl), "articles": distance(kl)},
            "runtime": distance(kl),
            "summaries": {"rougeL": [20.0, 22.0 - kl, 21.0]},
        }
        write(tmp_path / f"{name}.json", found)
    write(tmp_path / "olive-gptq.json", {"failed": "no wheel in /home/me"})
    rounds = [{"hqq": [0.1, 1.0], "q4_0": [0.2, 1.0 + i / 10]} for i in range(4)]
    key = {"threads": 2, "prompt": 128, "new": 65, "rows": ["hqq", "q4_0"]}
    write(tmp_path / rates.RECORD, {"key": key, "rounds": rounds})
    return tmp_path


def test_tables(run: Path) -> None:
    text = render(run)
    accuracy = next(line for line in text.splitlines() if "llama.cpp Q4_0" in line)
    assert "0.2000" in accuracy
    assert "20.9 (-0.1 ± 0.1)" in accuracy
    cost = [line for line in text.splitlines() if "llama.cpp Q4_0" in line][1]
    assert "| 90.0 | 1.12 | 10 | 2.00 | 0.500 (0.500 to 0.500), 640 tok/s |" in cost
    assert "Failed: Olive GPTQ, then the builder." in text
    assert "1,000 tokens of dialogues" in text
    assert not render(run / "nothing").count("caliport")


def test_rates_are_compared_within_a_round(run: Path) -> None:
    found = rates.spreads(read(run / rates.RECORD), "q4_0")
    assert found["prefill"] == (640.0, 0.5, 0.5, 0.5)
    assert found["decode"][2] == pytest.approx(0.871, abs=0.001)
    assert rates.spreads(read(run / rates.RECORD), "gptq") == {}


def test_plot(run: Path) -> None:
    picture = run / "int4.png"
    assert plot.draw(run, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not plot.draw(run / "nothing", picture)


def test_llama_runner_speaks_with_its_process(tmp_path: Path, monkeypatch: Any) -> None:
    import numpy as np

    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, struct, sys\n"
        "seen = 0\n"
        "for line in sys.stdin:\n"
        "    tokens = json.loads(line)\n"
        "    seen = seen + len(tokens) if tokens else 0\n"
        "    if tokens == [9]: sys.exit('no such token')\n"
        "    if tokens:\n"
        "        sys.stdout.buffer.write(struct.pack('<2f', tokens[-1], seen))\n"
        "        sys.stdout.flush()\n",
        encoding="utf-8",
    )
    monkeypatch.setattr("benchmarks.quantization.llama.WORKER", worker)
    runner = LlamaRunner(tmp_path / "model.gguf", sys.executable, 1, 8, 2)
    try:
        assert np.array_equal(runner.prefill([3, 4]), [4, 2])
        assert np.array_equal(runner.step(5), [5, 3])
        assert np.array_equal(runner.prefill([7]), [7, 1])
        with pytest.raises(InputError, match="has ended"):
            runner.step(9)
    finally:
        runner.close()
