"""What is wrong with what validation is given ends in one line and the right exit code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from caliport.api import load
from caliport.calibrate.training.small_base import BaseShape, build_model, build_tokenizer
from caliport.cli.main import app, guarded
from caliport.core.errors import InputError
from caliport.core.files import file_hash
from caliport.export.artifact import Artifact
from caliport.validation.runners.executorch import ExecuTorchRunner
from caliport.validation.runners.genai import GenaiRunner
from caliport.validation.runners.onnx import OnnxRunner
from caliport.validation.runners.open import Execution
from caliport.validation.runners.program import Program
from tests.commands import ROOT
from tests.conftest import TEXTS

Ended = tuple[int, str]
"""Exit code, and what was said: the errors where it is 2, else the tables."""


@pytest.fixture
def caliport(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """A command in this process, which has imported all that one needs."""

    def run(*arguments: object) -> Ended:
        command = [str(argument) for argument in arguments]
        code = guarded(lambda: app(command, standalone_mode=False), "caliport --help", False)
        out, errors = capfd.readouterr()
        if code == 2:
            assert errors.startswith("caliport: ")
            assert errors.count("\n") == 1, errors
        return code, errors if code == 2 else out

    return run


@pytest.fixture
def unrecorded(onnx_dir: Path, tmp_path: Path) -> Path:
    """The composition in int4 as another tool would leave it, without hashes to check first."""
    copy = shutil.copytree(onnx_dir, tmp_path / "theirs")
    (copy / "manifest.json").unlink()
    return copy


def flipped(content: bytes) -> bytes:
    """Every 97th byte of the first half inverted."""
    changed = np.frombuffer(content, np.uint8).copy()
    changed[: len(changed) // 2 : 97] ^= 0xFF
    return changed.tobytes()


def of_another_domain(content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    model.graph.node[0].domain, model.graph.node[0].op_type = "com.example", "Unheard"
    return bytes(model.SerializeToString())


def outside(content: bytes) -> bytes:
    """Weights looked for beside the directory."""
    return content.replace(b"model.onnx.data", b"../x/model.data")


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("model.onnx", lambda content: content[: len(content) // 3]),
        ("model.onnx", flipped),
        ("model.onnx", of_another_domain),
        ("model.onnx", outside),
        ("model.onnx.data", lambda content: content[:-5000]),
    ],
    ids=["cut", "flipped", "operator", "outside", "short data"],
)
def test_a_corrupted_onnx_file(unrecorded: Path, name: str, harm: Callable[[bytes], bytes]) -> None:
    content = (unrecorded / name).read_bytes()
    (unrecorded / name).write_bytes(harm(content))
    for runner in (OnnxRunner, GenaiRunner):
        with pytest.raises(InputError, match="cannot load it") as caught:
            runner(unrecorded, threads=1)  # past the checks of open_runner
        assert str(caught.value).startswith(str(unrecorded))
        assert "\n" not in str(caught.value)
        assert harm is not of_another_domain or "Unheard" in str(caught.value)


@pytest.mark.parametrize(
    ("part", "field", "value", "says"),
    [
        ("decoder", "filename", "gone.onnx", "gone.onnx: no such file, but genai_config.json"),
        ("decoder", "filename", "../model.onnx", "filename is '../model.onnx', expected a file of"),
        ("decoder", "filename", "/model.onnx", "filename is '/model.onnx', expected a file of"),
        ("decoder", "num_hidden_layers", None, "num_hidden_layers is None, expected an integer"),
    ],
)
def test_a_config_that_names_what_is_not_there(
    unrecorded: Path, part: str, field: str, value: object, says: str
) -> None:
    path = unrecorded / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"].setdefault(part, {})[field] = value
    path.write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        OnnxRunner(unrecorded, threads=1)
    assert says in str(caught.value)


@pytest.fixture(scope="module")
def unheard() -> Iterator[None]:
    """An operator that torch knows and ExecuTorch's runtime does not."""
    library = torch.library.Library("unheard", "DEF")
    library.define("of(Tensor x) -> Tensor")
    library.define("of.out(Tensor x, *, Tensor(a!) out) -> Tensor(a!)")
    library.impl("of", lambda x: x + 1, "CompositeExplicitAutograd")
    library.impl("of.out", lambda x, *, out: out.copy_(x + 1), "CompositeExplicitAutograd")
    yield
    library._destroy()


class Small(torch.nn.Module):
    """Logits of 8 tokens from a table."""

    def __init__(self, last: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(8, 8)
        self.last = last

    def forward(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return self.last(self.table(tokens) + position)


def lowered(module: torch.nn.Module) -> bytes:
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(
        torch.export.export(module, (torch.tensor([[1]]), torch.tensor([0]))),
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
        constant_methods={"get_max_context_len": 8},
    )
    return bytes(edge.to_executorch().buffer)


def test_operators_that_the_runtime_lacks(unheard: None, tmp_path: Path) -> None:
    (tmp_path / "model.pte").write_bytes(lowered(Small(torch.ops.unheard.of)))
    with pytest.raises(InputError) as caught:
        ExecuTorchRunner(tmp_path)
    assert "the runtime lacks operators that it calls: unheard::of.out" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_program_that_crashes_its_process(tmp_path: Path) -> None:
    """It is tried elsewhere first; tells too when ExecuTorch itself refuses such a program."""
    from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary
    from executorch.exir.schema import EValue, Int, Null

    file = deserialize_pte_binary(lowered(Small(torch.nn.Identity())))
    values = file.program.execution_plan[0].values
    harmed = [EValue(Null()) if isinstance(value.val, Int) else value for value in values]
    assert harmed != values
    file.program.execution_plan[0].values = harmed
    program = tmp_path / "model.pte"
    program.write_bytes(bytes(serialize_pte_binary(file)))
    with pytest.raises(InputError, match=r"model\.pte: ExecuTorch crashed on it \(SIG"):
        Execution(Artifact.read(tmp_path)).open()
    files = {program.name: {"bytes": program.stat().st_size, "sha256": file_hash(program)}}
    manifest = {"runtime": "executorch", "precision": "fp32", "files": files}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"model\.pte: ExecuTorch crashed on it \(SIG"):
        load(tmp_path)


def test_a_program_that_is_not_whole(tmp_path: Path) -> None:
    """Its contents are read without ExecuTorch too."""
    whole, path = lowered(Small(torch.nn.Identity())), tmp_path / "model.pte"
    for harmed in (b"", whole[:64], whole[:-1000], b"\0" * 400, whole[:40] + bytes(200)):
        path.write_bytes(harmed)
        with pytest.raises(InputError, match=r"model\.pte: "):
            Program(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="not a regular file"):
        Execution(Artifact(tmp_path, "executorch", "fp32")).open()


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """Two prompts with their answers."""
    rows = [{"input": "tennis", "output": "park"}, {"input": "Anna y Tom", "output": "viernes"}]
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def validate(
    caliport: Callable[..., Ended], base_dir: Path, adapter_dirs: list[Path], asked: Path
) -> Callable[..., Ended]:
    def run(artifact: Path, *flags: object, base: Path = base_dir) -> Ended:
        more = ["--prompts", asked, "--no-latency", "--threads", 1]
        if base == base_dir:
            more += ["--adapter", adapter_dirs[0]]
        return caliport("validate", artifact, "--base", base, *more, *flags)

    return run


def test_logits_that_are_not_finite(
    validate: Callable[..., Ended], unrecorded: Path, onnx_dir: Path, tmp_path: Path
) -> None:
    """Of an artifact they fail a gate; of what it is held to, they are bad input."""
    model = onnx.load(unrecorded / "model.onnx")
    scale = next(t for t in model.graph.initializer if t.name == "lm_head.scale")
    broken = onnx.numpy_helper.to_array(scale).copy()
    broken[7] = np.nan
    scale.CopyFrom(onnx.numpy_helper.from_array(broken, scale.name))
    onnx.save(model, unrecorded / "model.onnx")
    code, _ = validate(unrecorded, "--precision", "int4", "--out", tmp_path)
    assert code == 1
    (found,) = json.loads((tmp_path / "parity.json").read_text())["artifacts"]
    (gate,) = found["gates"]
    assert gate["name"] == "finite logits"
    assert "ONNX Runtime, after a prompt of" in gate["reason"]
    assert "1 of 384 logits are NaN or infinite" in gate["reason"]
    code, said = validate(onnx_dir, "--against", unrecorded)
    assert code == 2
    assert f"{unrecorded}: ONNX Runtime, after a prompt of" in said
    assert "expected a sound artifact" in said


def test_an_artifact_of_a_smaller_vocabulary(
    validate: Callable[..., Ended], unrecorded: Path, tmp_path: Path
) -> None:
    """Its tokens would be read from beyond the end of the embedding."""
    shape = BaseShape(
        vocab_size=420, hidden_size=32, intermediate_size=32, layers=1, heads=2, context=128
    )
    tokenizer = build_tokenizer([*TEXTS, *map(str, range(100, 200))], shape.vocab_size)
    build_model(tokenizer, shape, seed=0).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    for runner in ("plain", "genai"):
        flags = ("--precision", "int4", "--runner", runner)
        code, said = validate(unrecorded, *flags, base=tmp_path / "other")
        assert code == 2
        assert "gives 384 logits but the base has 420 tokens" in said


def test_the_tokenizer_of_another_model(validate: Callable[..., Ended], unrecorded: Path) -> None:
    """Logits say nothing of it."""
    tokenizer = build_tokenizer(["un texto completamente distinto " * 9], 384)
    tokenizer.save_pretrained(unrecorded)
    assert validate(unrecorded, "--precision", "int4")[0] == 1
    (unrecorded / "tokenizer.json").write_text("{")
    code, said = validate(unrecorded, "--precision", "int4")
    assert code == 2
    assert "tokenizer.json: not usable as a tokenizer" in said


@pytest.mark.parametrize("content", ["", "\n  \n\n"], ids=["empty", "blank"])
def test_nothing_to_ask(
    validate: Callable[..., Ended], onnx_dir: Path, asked: Path, content: str
) -> None:
    asked.write_text(content)
    code, said = validate(onnx_dir)
    assert code == 2
    assert f"{asked}, line 1: the file has no examples" in said


def test_a_recipe_that_asks_nothing(caliport: Callable[..., Ended]) -> None:
    recipe = ROOT / "recipes" / "toy.yaml"
    code, said = caliport("validate", recipe, "--set", "validation.examples=0")
    assert code == 2
    assert "validation.examples" in said


def test_a_runner_that_cannot_be(
    validate: Callable[..., Ended], onnx_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "pte").mkdir()
    (tmp_path / "pte" / "model.pte").write_bytes(b"")
    for artifact, runner, says in (
        (onnx_dir, "fast", "--runner is 'fast', expected plain, genai or MODULE:FUNCTION"),
        (onnx_dir, "json:gone", "expected MODULE:FUNCTION"),
        (tmp_path / "pte", "genai", "onnxruntime-genai cannot run; expected --runner plain"),
    ):
        flags = [] if artifact == onnx_dir else ["--precision", "int4"]
        code, said = validate(artifact, "--runner", runner, *flags)
        assert code == 2
        assert says in said
