"""Write a checkpoint with the shape of Llama-3.2-1B and random weights, tensor by tensor.

Nothing is downloaded and the same seed gives the same bytes. At most one tensor is in memory.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.outputs import new_directory

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

BEGIN, END, TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
_NAMED = (BEGIN, END, "<|start_header_id|>", "<|end_header_id|>", TURN)
_CHAT_TEMPLATE = (
    "{{ '" + BEGIN + "' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content']"
    " + '" + TURN + "' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
_STD = 0.02


@dataclass(frozen=True)
class Shape:
    """Shape of a Llama decoder with tied embeddings; the defaults are those of Llama-3.2-1B.

    ``reserved`` rows of the embedding are special tokens, as in Llama's vocabulary.
    """

    vocab: int = 128256
    hidden: int = 2048
    intermediate: int = 8192
    layers: int = 16
    heads: int = 32
    key_value_heads: int = 8
    head_dim: int = 64
    context: int = 131072
    reserved: int = 256


SHAPES = {
    "1b": Shape(),
    "tiny": Shape(2048, 256, 1024, 2, 4, 2, 64, 131072, 32),
}


def write_checkpoint(shape: Shape, out: Path, seed: int = 0) -> int:
    """Write a Hugging Face directory; ``out`` appears complete or not at all.

    Args:
        shape: Shape of the model.
        out: The directory to write: ``config.json``, ``generation_config.json``,
            ``model.safetensors`` in bfloat16, ``tokenizer.json``, ``tokenizer_config.json``.
        seed: Random seed of the weights and of the tokenizer's training text.

    Returns:
        The number of parameters; tied ones count once.

    Raises:
        InputError: ``out`` cannot be written.
    """
    settings = {"shape": asdict(shape), "seed": seed}
    tensors = dict(tensor_shapes(shape))
    parameters = sum(_count(sizes) for sizes in tensors.values())
    with new_directory(out, "checkpoint", {}, settings) as (partial, extra):
        tokenizer = _tokenizer(shape, seed)
        tokenizer.save(str(partial / "tokenizer.json"))
        for name, content in _settings(shape, tokenizer).items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _write_weights(tensors, partial / "model.safetensors", seed)
        extra["parameters"] = parameters
    return parameters


def tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the checkpoint's tensors, in the order of the file."""
    inner, narrow = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (shape.hidden,)
        yield at + "self_attn.q_proj.weight", (inner, shape.hidden)
        yield at + "self_attn.k_proj.weight", (narrow, shape.hidden)
        yield at + "self_attn.v_proj.weight", (narrow, shape.hidden)
        yield at + "self_attn.o_proj.weight", (shape.hidden, inner)
        yield at + "post_attention_layernorm.weight", (shape.hidden,)
        yield at + "mlp.gate_proj.weight", (shape.intermediate, shape.hidden)
        yield at + "mlp.up_proj.weight", (shape.intermediate, shape.hidden)
        yield at + "mlp.down_proj.weight", (shape.hidden, shape.intermediate)
    yield "model.norm.weight", (shape.hidden,)


def _count(sizes: tuple[int, ...]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count


def _write_weights(tensors: dict[str, tuple[int, ...]], path: Path, seed: int) -> None:
    """Write a safetensors file: the header's length, the header, and the tensors in order."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, sizes in tensors.items():
        start, end = end, end + 2 * _count(sizes)
        header[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    draw = torch.Generator().manual_seed(seed)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for sizes in tensors.values():
            for rows in _random(sizes, draw):
                rows.view(torch.int16).numpy().tofile(stream)


def _random(sizes: tuple[int, ...], draw: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield a tensor in slices of rows: 1 for norms, normally distributed otherwise."""
    import torch

    if len(sizes) == 1:
        yield torch.ones(sizes, dtype=torch.bfloat16)
        return
    rows, width = sizes
    for start in range(0, rows, 8192):
        piece = torch.empty(min(8192, rows - start), width)
        yield piece.normal_(0.0, _STD, generator=draw).bfloat16()


def _tokenizer(shape: Shape, seed: int) -> Tokenizer:
    """Byte-level BPE over invented words, filled up to the vocabulary with reserved tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers import trainers as train

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = train.BpeTrainer(
        vocab_size=shape.vocab - shape.reserved,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(shape.vocab, seed), trainer)
    free = shape.vocab - tokenizer.get_vocab_size() - len(_NAMED)
    special = [*_NAMED, *(f"<|reserved_special_token_{number}|>" for number in range(free))]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
    )
    return tokenizer


def _texts(words: int, seed: int) -> Iterator[str]:
    """Lines of ``words`` invented words, with frequencies that fall with a word's rank."""
    draw = random.Random(seed)
    syllables = [c + v + e for c in "bcdfgklmnprstvz" for v in "aeiou" for e in ("", "n", "r", "s")]
    lexicon: dict[str, None] = {}
    while len(lexicon) < words:
        lexicon["".join(draw.choices(syllables, k=draw.randint(1, 4)))] = None
    ranked = list(lexicon)
    for start in range(0, words, 64):
        often = draw.choices(ranked[:1024], k=64)
        yield " ".join(["", *ranked[start : start + 64], *often, *ranked[start : start + 64]])


def _settings(shape: Shape, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """The JSON files beside the weights, in the format of Llama's files."""
    begin, end, turn = (tokenizer.token_to_id(token) for token in (BEGIN, END, TURN))
    ids = {"bos_token_id": begin, "eos_token_id": [end, turn]}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": _STD,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.context,
        "mlp_bias": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.key_value_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab,
        **ids,
    }
    return {
        "config.json": config,
        "generation_config.json": {"do_sample": False, **ids},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": shape.context,
            "chat_template": _CHAT_TEMPLATE,
        },
    }
