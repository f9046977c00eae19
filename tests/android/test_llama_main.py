"""ExecuTorch on a Linux device: our runner of jobs, and what has llama_main's flags and output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT
from conftest import TEXTS

from caliport.android_harness.runners.executorch import (
    executorch_runner,
    llama_main_flags,
    parse_llama_main,
)
from caliport.android_harness.runners.job import Job, Prompt, Result, Timing
from caliport.android_harness.runners.kinds import answers
from caliport.core.checkpoints import load_tokenizer, render_prompt
from caliport.core.errors import InputError
from caliport.validation.runners.executorch import ExecuTorchRunner, generate
from caliport.validation.runners.runner import greedy
from tests.exports import to_executorch

CONTEXT = 96
# As ExecuTorch 1.5.1 prints it.
FIGURES = {
    "prompt_tokens": 9,
    "generated_tokens": 7,
    "model_load_start_ms": 1000,
    "model_load_end_ms": 1250,
    "inference_start_ms": 1300,
    "inference_end_ms": 1900,
    "prompt_eval_end_ms": 1390,
    "first_token_ms": 1400,
    "aggregate_sampling_time_ms": 3,
    "SCALING_FACTOR_UNITS_PER_SECOND": 1000,
}


@pytest.fixture(scope="module")
def artifact(
    base_dir: Path, adapter_dirs: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("jobs") / "executorch"
    return to_executorch(base_dir, out, adapter=adapter_dirs[0], precision="int8", context=CONTEXT)


def run(place: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=place, env=ENVIRONMENT, capture_output=True, text=True)


def test_a_job_is_answered_as_on_the_host(artifact: Path, prompts: list[list[int]]) -> None:
    place, core = artifact.parent, min(os.sched_getaffinity(0))
    asked = (
        Prompt(tokens=tuple(prompts[0]), targets=tuple(prompts[1][:4])),
        Prompt(tokens=tuple(prompts[1]), write=False),
    )
    job = Job(
        runtime="executorch",
        directory="executorch",
        threads=1,
        cores=(core,),
        max_new_tokens=6,
        prompts=asked,
        timing=Timing(prompt_lengths=(3, 8), new_tokens=2, repetitions=2),
    )
    (place / "job.json").write_text(job.model_dump_json())
    command = executorch_runner().started("", "job.json", "result.json")
    done = run(place, command)
    assert (done.returncode, done.stderr) == (0, "")
    found = Result.model_validate_json((place / "result.json").read_bytes())
    assert found.runner == "caliport-executorch-python 1"
    assert (found.threads, found.cores) == (1, (core,))
    assert found.answers == answers(ExecuTorchRunner(artifact, threads=1), job)
    assert [(t.prompt_tokens, len(t.step_seconds)) for t in found.turns] == [(3, 1), (8, 1)] * 2
    assert 0 < found.idle_bytes < found.loaded_bytes <= found.peak_bytes

    for change, expected in [
        ({"runtime": "onnx"}, "job.json: runtime: found onnx, expected executorch"),
        ({"adapter": "none"}, "has no method 'none'"),
        ({"threads": 0}, "job.json: threads: Input should be greater than or equal to 1"),
        ({"cores": [1 << 15]}, "cores: found 32768, expected cores that are there"),
    ]:
        text = {**json.loads(job.model_dump_json()), **change}
        (place / "job.json").write_text(json.dumps(text))
        (place / "result.json").unlink(missing_ok=True)
        done = run(place, command)
        assert done.returncode == 2
        assert expected in done.stderr
        assert done.stderr.count("\n") == 1
        assert not list(place.glob("result.json*"))


def test_llama_mains_flags_give_the_stock_text_and_figures(artifact: Path, base_dir: Path) -> None:
    tokenizer = load_tokenizer(base_dir)
    runner = ExecuTorchRunner(artifact, threads=1)
    for word in " ".join(TEXTS).split():  # random weights write bytes that are no text too
        prompt = render_prompt(tokenizer, word)
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        text = tokenizer.decode(greedy(runner, ids, 8, ()))
        if text.isascii() and text.isprintable():
            break
    flags = llama_main_flags("model.pte", "tokenizer.json", prompt, 8, 1)
    command = [sys.executable, "-m", "caliport.android_harness.runners.llama_main", *flags]
    done = run(artifact, command)
    assert done.returncode == 0, done.stderr
    found = parse_llama_main(done.stdout, prompt)
    assert found.text == generate(artifact, prompt, 8) == text
    assert found.prompt_tokens == len(ids)
    assert found.decoded_tokens == 7
    assert 0 <= found.first_token_seconds < 10
    assert 0 <= found.decode_seconds < 10

    for change, expected in [
        ("--method_name=other", "method_name: found other, expected forward"),
        ("--tokenizer_path=none.json", "none.json: no such file"),
        ("--model_path=tokenizer.json", "tokenizer.json: "),
    ]:
        done = run(artifact, [*command, change])
        assert done.returncode == 2
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"llama_main: {expected}")


def test_figures_are_seconds() -> None:
    text = f"Ask me\nIt\nis so\nPyTorchObserver {json.dumps(FIGURES)}\nlog\n"
    found = parse_llama_main(text, "Ask me\n")
    assert found.text == "It\nis so"
    assert (found.prompt_tokens, found.decoded_tokens) == (9, 7)
    assert (found.load_seconds, found.first_token_seconds) == (0.25, 0.1)
    assert found.decode_seconds == 0.5


@pytest.mark.parametrize(
    "output",
    [
        "",
        "Ask me It is so\n",
        "PyTorchObserver ",
        'PyTorchObserver {"prompt_tokens": 9',
        f"PyTorchObserver {json.dumps({**FIGURES, 'SCALING_FACTOR_UNITS_PER_SECOND': 0})}",
        f"PyTorchObserver {json.dumps({**FIGURES, 'first_token_ms': None})}",
        "PyTorchObserver []",
    ],
)
def test_output_without_figures_is_one_line(output: str) -> None:
    with pytest.raises(InputError, match="expected a line of PyTorchObserver") as caught:
        parse_llama_main(output, "Ask me ")
    assert "\n" not in str(caught.value)
