"""The child process of ``gguf_base``: converts a ``.gguf`` file to a Hugging Face directory.

It answers with one line of JSON: ``{}``, or ``error`` with what is wrong. transformers reads the
file; what it would pass over without a word is an error here.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.errors import InputError, one_line
from caliport.core.model_files.base_settings import check_settings
from caliport.core.model_files.gguf_header import GgufHeader, read_gguf_header
from caliport.core.untrusted import shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FILE = "model.gguf"
"""Name of the file, or of a link to it, in the directory that the child reads; alone there."""
_INSTEAD = "expected the model's safetensors directory"
_ROPE = "rope_freqs.weight"
# Keys that say nothing of what the model computes, or that transformers sees in the tensors.
_UNUSED = ("vocab_size", "context_length", "tensor_data_layout", "rope.scaling.finetuned")
# How vocabularies of bytes split text, where that is GPT-2's way, or its way after single digits.
_AS_GPT2 = ("gpt-2", "phi-2", "olmo", "jina-es", "jina-de", "mellum", "gigachat", "a.x-4.0")
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


def convert(source: Path, out: Path) -> None:
    """Write the model and tokenizer of ``source / FILE`` to ``out``, in float32.

    Raises:
        InputError: transformers cannot read it, or would leave some of it out.
    """
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    gguf.GGUFReader = lru_cache(1)(gguf.GGUFReader)  # type: ignore[misc,assignment]  # asked thrice
    path = source / FILE
    header = read_gguf_header(path)
    _check_splitting(header)
    config = AutoConfig.from_pretrained(source, gguf_file=FILE)
    check_settings(config.to_dict(), Path("its settings"))
    if config.is_encoder_decoder:
        raise InputError("a sequence-to-sequence model, expected a causal language model")
    vars(config).pop("_model_name_or_path", None)  # the file's general.name
    _check_read(header, config)
    if _ROPE in header.tensors:
        _scale_rotary(path, config)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE, trust_remote_code=False)
    _split_digits(header, tokenizer)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=FILE,
        config=config,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # no kernel is fetched
        output_loading_info=True,
        trust_remote_code=False,
    )
    model, info = loaded
    if info["missing_keys"]:
        raise InputError(f"has no {shown(sorted(info['missing_keys'])[0], 200)}, {_INSTEAD}")
    _check_whole(header, model)
    model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    ends = [header.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    found = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    if model.generation_config is not None and len(found) > 1:
        model.generation_config.eos_token_id = found
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _check_splitting(header: GgufHeader) -> None:
    """Check that transformers knows how the tokenizer splits text; else it splits as GPT-2."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if header.fields.get("tokenizer.ggml.model") != "gpt2":
        return
    way = header.fields.get("tokenizer.ggml.pre")
    if way not in (*GGUF_PRE_TOKENIZER_SPLITS, *_AS_GPT2, *_DIGITS):
        raise InputError(
            f"tokenizer.ggml.pre is {shown(way)}, a way to split text that transformers does not "
            f"know; {_INSTEAD}"
        )


def _split_digits(header: GgufHeader, tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers import pre_tokenizers

    fields, backend = header.fields, getattr(tokenizer, "backend_tokenizer", None)
    if fields.get("tokenizer.ggml.model") == "gpt2" and fields.get("tokenizer.ggml.pre") in _DIGITS:
        assert backend is not None
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )


def _check_read(header: GgufHeader, config: PretrainedConfig) -> None:
    """Check that each setting of the model is read, or says what transformers takes for granted."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    name = header.fields["general.architecture"]
    mappings: Any = GGUF_CONFIG_MAPPING
    read = mappings.get(name, mappings.get(config.model_type))
    if read is None:
        return  # an architecture whose settings transformers reads one by one
    if name == "llama" and f"{name}.attention.head_count_kv" not in header.fields:
        raise InputError(f"has no llama.attention.head_count_kv; {_INSTEAD}")  # reordered without
    text: Any = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rope = getattr(text, "rope_parameters", None) or {}
    granted: Mapping[str, Any] = {
        "rope.dimension_count": head * rope.get("partial_rotary_factor", 1),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.scaling.type": "none",
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.causal": True,
    }
    for full, value in header.fields.items():
        key = full.removeprefix(f"{name}.")
        if key == full or read.get(key) is not None or key in _UNUSED or not value:
            continue
        taken = granted.get(key, getattr(text, key.rpartition(".")[2], None))
        if isinstance(value, float) and isinstance(taken, int | float):
            same = math.isclose(value, taken, rel_tol=1e-5)
        else:
            same = value == taken
        if not same:
            raise InputError(
                f"{shown(full)} is {shown(value)}, which transformers does not read; {_INSTEAD}"
            )


def _scale_rotary(path: Path, config: PretrainedConfig) -> None:
    """Turn the factors of the rotary frequencies into Llama 3's settings, which made them."""
    import torch
    from gguf import GGUFReader
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == _ROPE)
    factors = torch.from_numpy(found.data.copy()).flatten().float()
    rope: Any = config.get_text_config().rope_parameters
    theta = rope["rope_theta"]
    plain = theta ** -(torch.arange(len(factors)) / len(factors))
    rope |= {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if scaled.shape != plain.shape or not torch.allclose(scaled, plain / factors, rtol=1e-4):
        raise InputError(f"{_ROPE} has factors that are not Llama 3's, {_INSTEAD}")


def _check_whole(header: GgufHeader, model: PreTrainedModel) -> None:
    """Check that the model has each value of the file's tensors, and no other."""
    kept = {value.data_ptr(): value.numel() for value in model.state_dict().values()}
    stored = header.values - header.tensors.get(_ROPE, 0)
    if sum(kept.values()) != stored:
        raise InputError(
            f"has {stored:,} values in its tensors, of which transformers reads "
            f"{sum(kept.values()):,}; {_INSTEAD}"
        )


def answer(source: Path, out: Path, memory: int) -> dict[str, str]:
    """Convert, and say what is wrong with the file; nothing if nothing is.

    Args:
        source: A directory with nothing but ``FILE``.
        out: The directory to write.
        memory: The limit of this process in bytes, for the message.
    """
    try:
        convert(source, out)
    except InputError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": f"takes more than {memory / 1e9:.1f} GB of memory"}
    except Exception as error:  # whatever transformers raises is what is wrong with the file
        return {"error": f"transformers cannot read it ({one_line(error)}); {_INSTEAD}"}
    return {}


def main(source: Path, out: Path, memory: int, seconds: int) -> int:
    """Convert within limits, print the answer, and return the exit code."""
    for kind, most in (("AS", memory), ("CPU", seconds), ("CORE", 0)):
        number = getattr(resource, f"RLIMIT_{kind}")
        given = resource.getrlimit(number)[1]
        limit = most if given == resource.RLIM_INFINITY else min(most, given)
        resource.setrlimit(number, (limit, given))
    found = answer(source, out, memory)
    print(json.dumps(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
