"""The .pte gives eager PyTorch's logits however it is fed, and the stock runner eager's tokens."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from caliport.core.checkpoints import encode_prompt, load_base, load_tokenizer, render_prompt
from caliport.core.errors import InputError
from caliport.core.patching import quiet
from caliport.export.decoder.shipped import every, group, shipped_decoder
from caliport.export.executorch import lower as executorch
from caliport.export.executorch.patches.fast_lowering import fast_lowering
from caliport.export.executorch.steps import finish
from caliport.export.quantization.choices import PRECISIONS, Quantization
from caliport.export.quantization.tensors import quantize
from caliport.validation.runners.executorch import ExecuTorchRunner, generate
from tests.exports import to_executorch
from tests.lowerings import lowered_anew
from tests.sampling import thorough

CONTEXT = 96
TEXT = "Anna and Tom meet in the park on Friday"

# Largest distance from eager, as a share of the largest logit. In float the two differ by the
# order of sums. With quantized activations a value on the edge between two steps may be rounded to
# either side, and one step of 1/255 of a token's range then moves through the layers.
# From the first such step on, the distance is that of two ways of rounding: as large as what
# quantizing activations costs at all (2e-2 on this model), and not smaller for a better exporter.
# ``test_most_tokens_meet_no_rounding_edge`` is what tells a right exporter from a near miss.
TOLERANCE = {"fp32": 1e-5, "int8": 6e-2, "int4": 6e-2}


@dataclass
class Artifact:
    precision: str
    directory: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    facts: dict
    greedy: list[int]


def _greedy(model: PreTrainedModel, tokens: list[int], count: int) -> list[int]:
    new: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            new.append(int(model(torch.tensor([tokens + new])).logits[0, -1].argmax()))
    return new


@pytest.fixture(scope="session")
def artifact_of(
    base_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Artifact]:
    """Quantize and lower, each precision once; eager's eighth token is the one that ends a text."""
    made: dict[str, Artifact] = {}

    def artifact(precision: str) -> Artifact:
        if precision not in made:
            model = quantize(load_base(base_dir), precision)
            tokenizer = load_tokenizer(base_dir)
            greedy = _greedy(model, encode_prompt(tokenizer, TEXT), 8)
            greedy = greedy[: greedy.index(greedy[-1]) + 1]
            out = tmp_path_factory.mktemp(precision)
            with shipped_decoder(base_dir, None, precision, out) as decoder:
                facts = executorch.lower(
                    decoder, out, CONTEXT, [greedy[-1]], tokenizer.bos_token_id
                )
            tokenizer.save_pretrained(out)
            made[precision] = Artifact(precision, out, model, tokenizer, facts, greedy)
        return made[precision]

    return artifact


@pytest.fixture(params=PRECISIONS)
def artifact(request: pytest.FixtureRequest, artifact_of: Callable[[str], Artifact]) -> Artifact:
    return artifact_of(request.param)


def _eager(artifact: Artifact, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return artifact.model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def _check(artifact: Artifact, found: np.ndarray, expected: np.ndarray) -> None:
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE[artifact.precision], error


def test_prefill_gives_eager_logits(artifact: Artifact, prompts: list[list[int]]) -> None:
    runner = ExecuTorchRunner(artifact.directory)
    assert runner.context == CONTEXT
    for prompt in prompts:
        _check(artifact, runner.prefill(prompt), _eager(artifact, prompt)[-1])


def test_steps_and_chunks_give_eager_logits_up_to_the_last_position(artifact: Artifact) -> None:
    draw = np.random.default_rng(0)
    tokens = draw.integers(5, 300, CONTEXT).tolist()
    expected = _eager(artifact, tokens)
    runner = ExecuTorchRunner(artifact.directory)
    _check(artifact, runner.prefill(tokens[:1]), expected[0])
    for position in range(1, 12):
        _check(artifact, runner.step(tokens[position]), expected[position])
    for start, end in ((12, 45), (45, CONTEXT - 1), (CONTEXT - 1, CONTEXT)):
        _check(artifact, runner.extend(tokens[start:end]), expected[end - 1])
    with pytest.raises(InputError, match=f"within its context of {CONTEXT}"):
        runner.step(5)
    _check(artifact, runner.prefill(tokens), expected[-1])


def test_reset_forgets(artifact: Artifact, prompts: list[list[int]]) -> None:
    runner = ExecuTorchRunner(artifact.directory)
    fresh = runner.prefill(prompts[0])
    runner.prefill(prompts[2])
    runner.step(7)
    np.testing.assert_array_equal(runner.prefill(prompts[0]), fresh)
    runner.reset()
    np.testing.assert_array_equal(runner.extend(prompts[0]), fresh)


def test_most_tokens_meet_no_rounding_edge(artifact: Artifact) -> None:
    """Alone in the context, nearly every token gives eager's logits to float accuracy.

    So weights, scales and the quantization of activations are the very same numbers: with group
    scales not rounded to bfloat16 beforehand, for one, no int4 token would.
    """
    runner = ExecuTorchRunner(artifact.directory)
    tokens = list(range(5, 205))
    with torch.no_grad():
        expected = artifact.model(torch.tensor(tokens).unsqueeze(1)).logits[:, 0].numpy()
    found = np.stack([runner.prefill([token]) for token in tokens])
    errors = np.abs(found - expected).max(1) / np.abs(expected).max(1)
    assert (errors < 1e-5).mean() > (0.999 if artifact.precision == "fp32" else 0.8)


def _clear(artifact: Artifact, tokens: list[int]) -> list[int]:
    """Eager's greedy tokens up to where another is too near for the artifact to be held to it."""
    new: list[int] = []
    for token in artifact.greedy:
        first, second = np.sort(_eager(artifact, tokens + new)[-1])[[-1, -2]]
        if first - second < 2 * TOLERANCE[artifact.precision] * abs(first):
            break
        new.append(token)
    return new


def test_stock_runner_writes_eagers_tokens_and_stops_at_the_end_token(
    artifact: Artifact, capfd: pytest.CaptureFixture[str]
) -> None:
    """From a prompt whose begin token is text, and with nothing on the terminal."""
    tokenizer = artifact.tokenizer
    tokens = encode_prompt(tokenizer, TEXT)
    ending = artifact.greedy[-1]
    runner = ExecuTorchRunner(artifact.directory)
    expected = [int(runner.prefill(tokens).argmax())]
    while expected[-1] != ending and len(expected) < 20:
        expected.append(int(runner.step(expected[-1]).argmax()))
    for count in (3, 20):
        written = generate(artifact.directory, render_prompt(tokenizer, TEXT), count)
        assert written == tokenizer.decode(expected[:count])
    clear = _clear(artifact, tokens)
    assert clear == expected[: len(clear)]
    if artifact.precision == "fp32":
        assert clear == expected == artifact.greedy
    assert capfd.readouterr() == ("", "")


def test_stock_runner_adds_the_begin_token_that_a_tokenizer_without_template_adds(
    artifact_of: Callable[[str], Artifact], tmp_path: Path
) -> None:
    artifact = artifact_of("fp32")
    begin = artifact.tokenizer.bos_token
    shutil.copy(artifact.directory / "model.pte", tmp_path)
    tokenizer = Tokenizer.from_file(str(artifact.directory / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, artifact.tokenizer.bos_token_id)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "Anna"
    tokens = tokenizer.encode(text).ids
    assert tokens[0] == artifact.tokenizer.bos_token_id
    expected, without = (_greedy(artifact.model, ids, 6) for ids in (tokens, tokens[1:]))
    assert expected != without
    assert generate(tmp_path, text, 6) == artifact.tokenizer.decode(expected)


def test_all_linears_run_in_xnnpack(artifact: Artifact) -> None:
    facts, model = artifact.facts, artifact.model
    linears = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    norms = sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    assert facts["products_delegated"] == linears + norms
    assert facts["constant_methods"]["get_max_context_len"] == CONTEXT
    json.dumps(facts)


def test_sizes_shrink_with_the_bits(artifact_of: Callable[[str], Artifact]) -> None:
    sizes = [(artifact_of(p).directory / "model.pte").stat().st_size for p in PRECISIONS]
    assert sizes[0] > 2 * sizes[1] > 2 * sizes[2]


def _checkpoint(directory: Path, layers: int, seed: int = 0, **settings: object) -> Path:
    """A tiny Llama with random weights, its norms too, so that no two layers are alike."""
    config = LlamaConfig(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            **settings,
        }
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))
    model.save_pretrained(directory)
    return directory


# Tables are shared when a program is written and caches are made in its layers: each kind once.
@pytest.mark.parametrize(
    ("tied", "cache_bits"), [thorough(True, None), (False, 8)], ids=["tied", "own"]
)
def test_repeated_layers_give_the_program_of_all_layers(
    tmp_path: Path, tied: bool, cache_bits: int | None
) -> None:
    """Lowered as two layers and repeated, four layers give the very logits of four lowered ones."""
    base = _checkpoint(tmp_path / "base", 4, tie_word_embeddings=tied)
    found = []
    with shipped_decoder(
        base, None, Quantization("int4", cache_bits=cache_bits), tmp_path
    ) as decoder:
        assert group(decoder).kept == [0, 1]
        assert every(decoder).kept == [0, 1, 2, 3]
        constants = executorch.constant_methods(decoder.whole, 16, [2], 1)
        for layers in (group(decoder), every(decoder)):
            with quiet(), fast_lowering():
                edge = executorch.whole_program(decoder, layers, 16, constants)
                (tmp_path / "model.pte").write_bytes(finish(edge).buffer)
            runner = ExecuTorchRunner(tmp_path)
            found.append([runner.prefill([5, 9, 3]), runner.step(7), runner.step(8)])
    np.testing.assert_array_equal(found[0], found[1])


def test_decoders_of_one_shape_are_lowered_once_and_get_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third differs in its weights alone, and the fourth in its context."""
    lowered = []
    plain = executorch.lower_skeleton

    def counted(*args: Any, **more: Any) -> Any:
        lowered.append(args)
        return plain(*args, **more)

    monkeypatch.setattr(executorch, "lower_skeleton", counted)
    one, other = (_checkpoint(tmp_path / f"base-{seed}", 1, seed=seed) for seed in (0, 1))

    def program(base: Path, context: int = 16) -> bytes:
        with shipped_decoder(base, None, "int4", tmp_path) as decoder, quiet(), fast_lowering():
            edge = executorch.whole_program(decoder, group(decoder), context, {})
            return bytes(finish(edge).buffer)

    first, again, third, fourth = program(one), program(one), program(other), program(one, 8)
    assert len(lowered) == 2
    assert first == again
    assert third not in (first, fourth)
    with lowered_anew():
        assert third == program(other)


@pytest.mark.slow
def test_fast_lowering_gives_the_same_program(tmp_path: Path) -> None:
    """Tells when another executorch makes ``patches/skip_idle_passes.py`` needless or wrong."""
    base = _checkpoint(tmp_path / "base", 1)
    with shipped_decoder(base, None, "int4", tmp_path) as decoder, quiet():
        constants = executorch.constant_methods(decoder.whole, 16, [2], 1)
        with lowered_anew():
            plain = finish(executorch.whole_program(decoder, every(decoder), 16, constants)).buffer
        with lowered_anew(), fast_lowering():
            fast = finish(executorch.whole_program(decoder, every(decoder), 16, constants)).buffer
    assert fast == plain


def test_a_wrong_context_is_refused_before_any_work(base_dir: Path, tmp_path: Path) -> None:
    for context in (0, 129):
        with pytest.raises(InputError, match=f"context: found {context}, expected 1 to .* 128"):
            to_executorch(base_dir, tmp_path / "out", context=context)
    assert not list(tmp_path.iterdir())


def test_bad_programs_and_prompts_end_in_one_line(
    artifact_of: Callable[[str], Artifact], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = artifact_of("fp32").directory
    program = (good / "model.pte").read_bytes()
    with pytest.raises(InputError, match=r"0 \.pte files, expected model\.pte"):
        ExecuTorchRunner(tmp_path)
    for wrong in (b"", b"x" * 500, program[:1000], program[:-1000]):
        (tmp_path / "model.pte").write_bytes(wrong)
        for load in (ExecuTorchRunner, lambda path: generate(path, "a", 1)):
            with pytest.raises(InputError, match=r"model\.pte: not loadable") as info:
                load(tmp_path)
            assert "\n" not in str(info.value)
    shutil.copy(good / "model.pte", tmp_path)
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        generate(tmp_path, "a", 1)
    with pytest.raises(InputError, match=r"cannot be run by TextLLMRunner"):
        generate(good, "<|begin|>" + "a " * 200, 1)
    runner = ExecuTorchRunner(good)
    for tokens in ([], [5] * (CONTEXT + 1)):
        with pytest.raises(InputError, match=f"{len(tokens)} tokens after 0, expected 1 to"):
            runner.prefill(tokens)
    with pytest.raises(InputError, match="token 384, expected 0 to 383"):
        runner.prefill([384])
    assert capfd.readouterr() == ("", "")


def test_threads_are_set_and_not_changed_under_a_living_runner(
    artifact_of: Callable[[str], Artifact],
) -> None:
    directory = artifact_of("fp32").directory
    gc.collect()  # a failed test's traceback may keep its runner alive
    runner = ExecuTorchRunner(directory, threads=1)
    assert runner.threads == 1
    with pytest.raises(InputError, match="threads: found 2, expected 1 as long as"):
        ExecuTorchRunner(directory, threads=2)
    del runner
    assert ExecuTorchRunner(directory, threads=2).threads == 2
