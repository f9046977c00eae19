"""An artifact of a stranger, signed by its own manifest, is opened or refused in one line.

Each case changes one thing in a copy of one artifact and lets the manifest agree with it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from caliport.api import generate, load
from caliport.core.directories import MANIFEST, read_manifest
from caliport.core.errors import InputError
from caliport.export.api import add_composition
from caliport.export.artifact import Artifact
from caliport.validation.gates.packaging import packaging_gates
from caliport.validation.runners import trial
from caliport.validation.runners.open import open_runner, stock_generate
from tests.exports import to_onnx_bundle
from tests.faults.making import agree
from tests.fuzz.seeds import sign

CONFIG = "genai_config.json"


@pytest.fixture
def copy(onnx_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(onnx_dir, tmp_path / "theirs")


@pytest.fixture(scope="module")
def bundle_dir(
    base_dir: Path, adapter_dirs: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return to_onnx_bundle(base_dir, {"sum": adapter_dirs[0]}, tmp_path_factory.mktemp("b") / "of")


def put(tree: dict[str, Any], path: str, value: object) -> None:
    """Set the field at ``a/b/c``."""
    *parents, last = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value


def edit(file: Path, path: str, value: object) -> None:
    tree = json.loads(file.read_text())
    put(tree, path, value)
    file.write_text(json.dumps(tree))


def refused(directory: Path, *says: str) -> None:
    """By all that opens an artifact, in one line, before the runtimes see it."""
    for opens in (
        lambda: open_runner(Artifact.read(directory), 1),
        lambda: open_runner(Artifact.read(directory), 1, runner="genai"),
        lambda: stock_generate(Artifact.read(directory), "a", 1),
        lambda: load(directory, threads=1),
        lambda: generate(directory, "a", max_new_tokens=1, threads=1),
    ):
        with pytest.raises(InputError) as caught:
            opens()
        said = str(caught.value)
        assert "\n" not in said
        assert len(said) < 1000
        for words in says:
            assert words in said


DECODER = "model/decoder"
OPTIONS = f"{DECODER}/session_options"


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (f"{OPTIONS}/custom_ops_library", "x.so", "would load code or write a file"),
        (f"{OPTIONS}/enable_profiling", "/tmp/x", "would load code or write a file"),
        ("custom_ops_library", "x.so", "would load code or write a file"),
        ("model/vision/session_options/custom_ops_library", "x", "expected a text decoder"),
        (f"{DECODER}/pipeline", [{"a": {"filename": "b.onnx"}}], "pipeline: found nested lists"),
        (f"{OPTIONS}/session.optimized_model_filepath", "x", "expected only enable_cpu_mem_arena"),
        (f"{OPTIONS}/provider_options", [{"QNN": {"backend_path": "x.so"}}], "runs on the CPU"),
        (f"{OPTIONS}/intra_op_num_threads", 10**30, "expected an integer from 0 to 1024"),
        (f"{DECODER}/run_options", {"a": "b"}, "expected a text decoder of one graph"),
        ("model/embedding", {"filename": "b.onnx"}, "expected a text decoder of one graph"),
        (f"{DECODER}/filename", "../../x.onnx", "expected a file of the directory"),
        (f"{DECODER}/filename", "/etc/passwd", "expected a file of the directory"),
        (f"{DECODER}/filename", "", "expected a file of the directory"),
        (f"{DECODER}/filename", ["model.onnx"], "expected a file of the directory"),
        (f"{DECODER}/config_file", "x", "expected a number, true or false"),
        (f"{DECODER}/num_hidden_layers", 10**12, "expected an integer from 1 to"),
        (f"{DECODER}/num_hidden_layers", 1, "does not name the graph's input"),
        (f"{DECODER}/num_hidden_layers", 3, "the graph has no input"),
        (f"{DECODER}/head_size", -1, "expected an integer from 1 to"),
        (f"{DECODER}/inputs/past_key_names", "%999999999d", "with %d for the layer"),
        (f"{DECODER}/inputs", None, "inputs is None, expected an object"),
        ("model/eos_token_id", [[1]], "found nested lists"),
        ("model/eos_token_id", -7, "eos_token_id is -7, expected an integer from 0"),
        ("model/eos_token_id", True, "eos_token_id is True, expected an integer"),
        ("model/context_length", 10**400, "an integer of more than 18 digits"),
        ("model/context_length", 1.5, "context_length is 1.5, expected an integer"),
        ("model", [], "model is [], expected an object"),
    ],
)
def test_a_configuration(copy: Path, path: str, value: object, says: str) -> None:
    edit(copy / CONFIG, path, value)
    agree(copy, None)
    if "graph's input" in says or "graph has" in says:
        with pytest.raises(InputError, match=says):
            open_runner(Artifact.read(copy), 1)
        return
    refused(copy, CONFIG, says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"model": {"decoder": {}}, "model": {}}', "the key 'model' stands twice"),
        ('{"model": NaN}', "NaN is not JSON"),
        ("[" * 10_000, "nested too deep"),
        ("[]", "expected an object"),
    ],
)
def test_a_configuration_that_others_read_otherwise(copy: Path, text: str, says: str) -> None:
    (copy / CONFIG).write_text(text)
    agree(copy, None)
    refused(copy, CONFIG, says)


def located(name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = name

    return change


def in_a_function(model: onnx.ModelProto) -> None:
    tensor = onnx.TensorProto(data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="../outside")
    node = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    made = onnx.helper.make_function("own", "F", [], ["c"], [node], [])
    model.functions.append(made)


def looped(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("Loop", ["", ""], ["x"]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (located("../outside"), "has weights in '../outside', expected a file of its directory"),
        (located("/dev/zero"), "has weights in '/dev/zero', expected a file of its directory"),
        (located("a/../../outside"), "expected a file of its directory"),
        (located("linked/outside"), "is outside"),
        (located("gone"), "gone: not readable"),
        (located(""), "has weights in '', expected"),
        (in_a_function, "has weights in '../outside'"),
        (looped, "has a Loop, expected a decoder's graph"),
    ],
)
def test_a_graph(copy: Path, change: Callable[[onnx.ModelProto], None], says: str) -> None:
    (copy.parent / "outside").write_bytes((copy / "model.onnx.data").read_bytes())
    (copy / "linked").symlink_to(copy.parent)
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    change(model)
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    agree(copy, None)
    refused(copy, says)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x08"], ids=["empty", "noise", "cut"])
def test_a_graph_that_is_none(copy: Path, content: bytes) -> None:
    (copy / "model.onnx").write_bytes(content)
    agree(copy, None)
    with pytest.raises(InputError, match=r"model\.onnx: "):
        open_runner(Artifact.read(copy), 1)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "added_tokens.json", CONFIG])
@pytest.mark.parametrize("signed", [True, False])
def test_what_is_no_file_of_the_directory(copy: Path, name: str, signed: bool) -> None:
    """A pipe would block for ever; a link would read what the stranger may not name."""
    (copy / name).unlink(missing_ok=True)
    if not signed:
        (copy / MANIFEST).unlink()
    os.mkfifo(copy / name)
    refused(copy, "")
    (copy / name).unlink()
    (copy / name).symlink_to("/dev/zero")
    refused(copy, "")
    (copy / name).unlink()
    outside = copy.parent / "outside"
    outside.write_text("{}")
    (copy / name).symlink_to(outside)
    refused(copy, f"{copy / name}: is outside")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("bundle", None, "bundle is None, expected an object"),
        ("bundle/compositions", None, "bundle.compositions is None"),
        ("bundle/compositions/sum", None, "compositions.sum is None, expected an object"),
        ("bundle/compositions/sum/bytes", "9", "sum.bytes is '9', expected an integer"),
        ("bundle/compositions/sum/file", "../../outside", "expected a file of the directory"),
        ("bundle/compositions/sum/file", "/etc/passwd", "expected a file of the directory"),
        ("bundle/compositions/sum/file", None, "sum.file is None"),
        ("bundle/compositions/sum/file", "gone", "gone: not readable"),
        ("bundle/compositions/sum/stands_on", 3, "stands_on is 3, expected a list"),
        ("bundle/compositions/..", {"bytes": 1, "file": "model.onnx"}, "composition '..'"),
        ("bundle/adapters", {"a": {}}, "bundle.adapters.a.bytes is None"),
        ("bundle/modules/x", [1, "2"], "bundle.modules.x is '2', expected an integer"),
        ("bundle/modules/x", 3, "bundle.modules.x is 3, expected two sizes"),
        ("context", 0, "context is 0, expected an integer from 1"),
        ("context", "many", "context is 'many'"),
        ("inputs", {"base": 3}, "inputs.base is 3, expected text"),
        ("sizes/total", 1.5, "sizes.total is 1.5, expected an integer"),
        ("sizes", {"total": 3}, "sizes has no `head`"),
        ("base/vocab_size", -1, "base.vocab_size is -1"),
        ("quantization", [], "quantization is [], expected an object"),
        ("quantization/cache_bits", 3, "cache_bits is 3, expected None, 8"),
        ("quantization/tune_norms", "no", "tune_norms is 'no', expected true or false"),
        ("quantization/int8_layers", [3], "int8_layers is 3, expected text"),
        ("precision", "int3", "precision is 'int3', expected fp32, int8 or int4"),
        ("runtime", ["onnx"], "runtime is ['onnx'], expected"),
        ("files", None, "no `files`"),
        ("files/model.onnx", None, "files.model.onnx: expected `bytes` and `sha256`"),
        ("files/model.onnx/bytes", "x\x1b[31m", r"manifest.json records 'x\x1b[31m'"),
    ],
)
def test_a_manifest(
    bundle_dir: Path, adapter_dirs: list[Path], tmp_path: Path, path: str, value: object, says: str
) -> None:
    copy = shutil.copytree(bundle_dir, tmp_path / "theirs")
    (tmp_path / "outside").write_bytes((copy / "sum.onnx_adapter").read_bytes())
    edit(copy / MANIFEST, path, value)
    before = (copy / MANIFEST).read_bytes()
    refused(copy, MANIFEST if "gone" not in says else "", says)
    with pytest.raises(InputError):
        add_composition(copy, "more", adapter_dirs[1])
    assert (copy / MANIFEST).read_bytes() == before


def test_an_adapter_of_a_bundle_that_is_none(bundle_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle_dir, tmp_path / "theirs")
    (copy / "sum.onnx_adapter").write_bytes(b"\xff" * 100)
    agree(copy, None)
    for runner in ("plain", "genai"):
        with pytest.raises(InputError, match=r"sum\.onnx_adapter: not an adapter of ONNX Runtime"):
            open_runner(Artifact.read(copy), 1, "sum", runner)


@pytest.mark.parametrize(
    ("count", "says"),
    [
        (100_000, r"chat_template\.jinja: 1,400,000 bytes, expected at most"),
        (70_000, r"chat template of 980,000 characters, did not end in 2 seconds; expected"),
    ],
)
def test_a_template_is_bounded_before_the_stock_runner_reads_it(
    count: int, says: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its size, and by the time that onnxruntime_genai takes, the square of its expressions."""
    monkeypatch.setattr(trial, "_TEMPLATE_SECONDS", 2)
    (copy / "chat_template.jinja").write_text("{{ messages }}" * count)
    sign(copy)
    with pytest.raises(InputError, match=says):
        stock_generate(Artifact.read(copy), "Anna", 2)


def test_nothing_is_added_to_a_bundle_whose_weights_were_cut(
    bundle_dir: Path, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle_dir, tmp_path / "theirs")
    data = copy / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(InputError, match=r"model\.onnx\.data: \d+ bytes, manifest\.json records"):
        add_composition(copy, "more", adapter_dirs[1])
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert read_manifest(copy)["bundle"]["compositions"].keys() == {"sum"}


TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"


@pytest.mark.parametrize(
    ("file", "path", "value", "gate", "says"),
    [
        (TOKENIZER, "normalizer", {"type": "Lowercase"}, "tokenizer", "tokenizer.json: normalizer"),
        (TOKENIZER, "decoder", {"type": "Fuse"}, "tokenizer", "tokenizer.json: decoder"),
        (
            TOKENIZER,
            "truncation",
            {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            "tokenizer",
            "tokenizer.json: truncation",
        ),
        ("tokenizer_config.json", "model_max_length", 4, "tokenizer", "model_max_length"),
        (GENERATION, "temperature", 9.5, "settings", "generation_config.json: temperature"),
        (GENERATION, "do_sample", True, "settings", "generation_config.json: do_sample"),
        (GENERATION, "eos_token_id", [7], "ends", "a text ends at [7], the base's at"),
        (GENERATION, "eos_token_id", "</s>", "ends", "a text ends at ['</s>']"),
        (CONFIG, "model/eos_token_id", [7], "ends", "a text ends at [7], the base's at"),
        (CONFIG, "model/context_length", 64, "settings", "model.context_length"),
        (CONFIG, "model/vocab_size", 400, "settings", "model.vocab_size"),
        (CONFIG, "model/bos_token_id", 9, "settings", "model.bos_token_id"),
        (CONFIG, "search/do_sample", True, "settings", "search.do_sample"),
        (CONFIG, "search/top_k", 3, "settings", "search.top_k"),
        (MANIFEST, "context", 64, "settings", "model.context_length"),
        (MANIFEST, "context", 4096, "settings", "manifest.json: context"),
        (MANIFEST, "base/vocab_size", 400, "settings", "manifest.json: base.vocab_size"),
        (MANIFEST, "base/layers", 9, "settings", "manifest.json: base.layers"),
    ],
)
def test_files_beside_the_program_that_are_not_the_bases(
    copy: Path, base_dir: Path, file: str, path: str, value: object, gate: str, says: str
) -> None:
    """No logit shows them, and the manifest agrees with them."""
    edit(copy / file, path, value)
    agree(copy, None)
    failed = {g.name: g.reason for g in packaging_gates(Artifact.read(copy), base_dir)}
    passed = {g.name for g in packaging_gates(Artifact.read(copy), base_dir) if g.passed}
    assert failed.keys() - passed == {gate}
    assert says in failed[gate]


@pytest.mark.parametrize(("file", "gate"), [(TOKENIZER, "tokenizer"), (GENERATION, "settings")])
def test_files_beside_the_program_that_cannot_be_read(
    copy: Path, base_dir: Path, file: str, gate: str
) -> None:
    (copy / file).write_text("[" * 5000)
    agree(copy, None)
    (found,) = packaging_gates(Artifact.read(copy), base_dir)
    assert (found.name, found.passed) == (gate, False)
    assert "\n" not in found.reason


def test_files_beside_a_sound_program(onnx_dir: Path, bundle_dir: Path, base_dir: Path) -> None:
    for directory in (onnx_dir, bundle_dir):
        gates = packaging_gates(Artifact.read(directory), base_dir)
        assert [gate.reason for gate in gates if not gate.passed] == []
