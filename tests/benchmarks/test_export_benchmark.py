"""The export benchmark: its checkpoint, its measuring and its tables; no peer is installed here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.export.checkpoint import SHAPES, tensor_shapes, write_checkpoint
from benchmarks.export.environments import check_installed, install
from benchmarks.export.exporters import EXPORTERS, TORCH, Job
from benchmarks.export.measuring import measured
from benchmarks.export.meta import CHECKPOINT, PARAMETERS, write_meta
from benchmarks.export.records import Export, Results, Speed, read_results, write_record
from benchmarks.export.speed import prompt_of
from benchmarks.export.tables import render, write_tables
from benchmarks.export.turns import Course, Worker, reference_logits, with_threads
from caliport.core.directories import content_hash
from caliport.core.errors import InputError
from caliport.validation.records.record import Machine


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "tiny"
    write_checkpoint(SHAPES["tiny"], out)
    return out


def test_checkpoint_is_the_same_every_time(tiny: Path, tmp_path: Path) -> None:
    write_checkpoint(SHAPES["tiny"], tmp_path / "again")
    assert content_hash(tmp_path / "again") == content_hash(tiny)
    write_checkpoint(SHAPES["tiny"], tmp_path / "other", seed=1)
    assert content_hash(tmp_path / "other") != content_hash(tiny)


def test_checkpoint_loads(tiny: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(tiny, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    manifest = json.loads((tiny / "manifest.json").read_text())
    assert sum(p.numel() for p in model.parameters()) == manifest["parameters"]
    for name, weight in model.named_parameters():
        if "norm" not in name:
            assert weight.float().std().item() == pytest.approx(0.02, rel=0.02), name
    assert model.config.rope_parameters["rope_type"] == "llama3"
    assert model.config.rope_parameters["factor"] == 32


def test_tokenizer_fills_the_embedding(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert len(tokenizer) == SHAPES["tiny"].vocab
    config = json.loads((tiny / "config.json").read_text())
    ids = tokenizer.encode("Zażółć gęślą jaźń, 12 times.")
    assert ids[0] == config["bos_token_id"] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id in config["eos_token_id"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Zażółć gęślą jaźń, 12 times."


def test_shape_is_llamas() -> None:
    parameters = 0
    for _, sizes in tensor_shapes(SHAPES["1b"]):
        rows, columns = (*sizes, 1)[:2]
        parameters += rows * columns
    assert parameters == 1_235_814_400, "what Llama-3.2-1B has"


def test_meta_checkpoint_computes_the_same(tiny: Path, tmp_path: Path) -> None:
    import torch
    from executorch.examples.models.llama.llama_transformer import construct_transformer
    from executorch.examples.models.llama.model_args import ModelArgs

    write_meta(tiny, tmp_path)
    parameters = json.loads((tmp_path / PARAMETERS).read_text())
    model = construct_transformer(ModelArgs(**parameters, rope_scale_factor=32))
    weights = torch.load(tmp_path / CHECKPOINT)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not [name for name in missing if name.endswith("weight")]
    assert not unexpected
    prompt = prompt_of(48)
    with torch.no_grad():
        found = model(torch.tensor([prompt]))
    found = found[0] if isinstance(found, tuple) else found
    expected = torch.from_numpy(reference_logits(tiny, prompt))
    torch.testing.assert_close(found.reshape(-1, expected.numel())[-1], expected)


def test_memory_of_the_whole_tree_is_measured(tmp_path: Path) -> None:
    hold = "import time; held = b'x' * {size}; {more}time.sleep(1.0)"
    child = hold.format(size=120_000_000, more="")
    start = f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {child!r}]); "
    code = hold.format(size=80_000_000, more=start) + "; c.wait(); print('done')"
    usage = measured([sys.executable, "-c", code], tmp_path / "log")
    assert 1.0 < usage.seconds < 30.0
    assert 200_000_000 < usage.peak_bytes < 400_000_000
    assert (tmp_path / "log").read_text() == "done\n"


def test_a_short_peak_is_not_missed(tmp_path: Path) -> None:
    code = "import time; held = b'x' * 150_000_000; del held; time.sleep(0.5)"
    usage = measured([sys.executable, "-c", code], tmp_path / "log")
    assert usage.peak_bytes > 150_000_000


def test_a_failed_command_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ended with 3; (?s:.*)no such thing"):
        measured(
            [sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"], tmp_path / "log"
        )


def test_torch_is_always_pinned() -> None:
    for name, exporter in EXPORTERS.items():
        for step in exporter.installs:
            assert TORCH in step or "--no-deps" in step, name
            assert not any("index" in part or "/" in part for part in step), name


def test_environments_are_asked_for(tmp_path: Path) -> None:
    check_installed(["caliport-onnx"], tmp_path)
    assert not install("caliport-onnx", tmp_path), "ours is there"
    with pytest.raises(InputError, match="no environment for model-builder"):
        check_installed(["caliport-onnx", "model-builder"], tmp_path)


@pytest.mark.parametrize("name", EXPORTERS)
def test_commands_name_their_files(name: str, tiny: Path, tmp_path: Path) -> None:
    job = Job(tiny, tmp_path / "artifact", tmp_path / "work", 512, "/venv/bin/python")
    job.work.mkdir()
    EXPORTERS[name].prepare(job)
    command = EXPORTERS[name].command(job)
    settings = [*job.work.rglob("*.yaml"), *job.work.rglob("config.json")]
    given = " ".join([*command, *(entry.read_text() for entry in settings)])
    assert command[0].startswith("/venv/bin/")
    assert str(job.artifact) in given
    assert "512" in given


def test_threads_are_named_in_a_copy(tmp_path: Path) -> None:
    artifact = tmp_path / "peer"
    artifact.mkdir()
    (artifact / "model.onnx").write_bytes(b"graph")
    config: dict[str, Any] = {"model": {"decoder": {"session_options": {"log_id": "x"}}}}
    (artifact / "genai_config.json").write_text(json.dumps(config))
    copy = with_threads(artifact, 2)
    options = json.loads((copy / "genai_config.json").read_text())["model"]["decoder"]
    assert options["session_options"] == {"intra_op_num_threads": 2}
    assert (copy / "model.onnx").samefile(artifact / "model.onnx")
    assert json.loads((artifact / "genai_config.json").read_text()) == config


def test_an_artifact_that_cannot_be_run_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: (?s:.*)genai_config\.json"):
        Worker("onnx", tmp_path / "empty", Course(1, 4, 2, 1))


def _results() -> Results:
    def export(name: str, seconds: float, size: int) -> Export:
        return Export(
            exporter=name,
            checkpoint="key",
            context=2048,
            threads=2,
            seconds=seconds,
            peak_bytes=int(seconds * 1e8),
            files={"model.onnx": 1_000_000, "model.onnx.data": size, "tokenizer.json": 9_000_000},
            versions={"torch": "2.13.0"},
        )

    def speed(name: str, variant: str, rate: float) -> Speed:
        return Speed(
            exporter=name,
            variant=variant,
            prefill=[4 * rate, 4 * rate, rate],
            decode=[rate, rate, 9 * rate],
            cosine=0.99,
        )

    return Results(
        machine=Machine(cpu="A CPU", cores=2, memory_gb=24.0, os="Linux x86_64"),
        parameters=1_235_814_400,
        context=2048,
        prompt_tokens=128,
        new_tokens=64,
        threads=2,
        versions={"onnxruntime-genai": "0.18.0"},
        exports={
            "caliport-onnx": export("caliport-onnx", 20.0, 399_000_000),
            "model-builder": export("model-builder", 50.0, 799_000_000),
            "export-llm": export("export-llm", 400.0, 899_000_000),
        },
        speeds=[
            speed("caliport-onnx", "as written", 60.0),
            speed("caliport-onnx", "`intra_op_num_threads: 2`", 54.0),
            speed("model-builder", "as written", 30.0),
            speed("model-builder", "`intra_op_num_threads: 2`", 27.0),
        ],
    )


def test_tables_are_ratios_to_ours(tmp_path: Path) -> None:
    write_record(_results(), tmp_path / "results.json")
    text = render(read_results(tmp_path / "results.json"))
    rows = {
        row[1].strip(): row[2:-1] for row in (r.split("|") for r in text.splitlines()) if row[1:]
    }
    cells = {name: [cell.strip() for cell in row] for name, row in rows.items()}
    ours = cells["caliport, as written"]
    peer = cells["onnxruntime-genai model builder, as written"]
    assert ours[0] == "1.00 (20 s)"
    assert peer[0] == "2.50 (50 s)"
    assert peer[1] == "2.50 (5.0 GB)"
    assert peer[2] == "2.00 (800 MB)", "tokenizers do not count"
    assert peer[3] == "0.50 (120 tok/s)", "medians"
    assert peer[4] == "0.50 (30.0 tok/s)"
    named = cells["onnxruntime-genai model builder, `intra_op_num_threads: 2`"]
    assert named == ["", "", "", "0.50 (108 tok/s)", "0.50 (27.0 tok/s)", "0.9900"]
    assert cells["ExecuTorch `export_llm`"][:4] == ["400 s", "40.0 GB", "900 MB", ""]
    assert "1,235,814,400 parameters" in text
    assert "A CPU, 2 cores" in text
    assert "Olive" in text


def test_tables_go_between_their_marks(tmp_path: Path) -> None:
    document = tmp_path / "results.md"
    document.write_text("before\n<!-- export: tables -->\nstale\n<!-- export: end -->\nafter\n")
    for _ in range(2):
        write_tables(_results(), document)
    text = document.read_text()
    assert text.startswith("before\n<!-- export: tables -->\n\n1,235")
    assert text.endswith("<!-- export: end -->\nafter\n")
    assert "stale" not in text
    document.write_text("no marks")
    with pytest.raises(InputError, match="no place for the tables"):
        write_tables(_results(), document)


def test_missing_results_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"benchmarks\.export run"):
        read_results(tmp_path / "results.json")
