"""Base models and tokenizers as Hugging Face directories, read safely."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.errors import InputError, one_line
from caliport.core.files import GENERATION_CONFIG
from caliport.core.model_files.base_files import check_base_files, local
from caliport.core.model_files.base_model import check_base, check_loaded, silent
from caliport.core.model_files.chat_templates import render_chat
from caliport.core.model_files.gguf_base import as_directory
from caliport.core.model_files.tokenizers import no_panic, open_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import (
        GenerationConfig,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )


def load_base(path: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a causal language model in eval mode.

    Args:
        path: A Hugging Face directory or a ``.gguf`` file, or a hub name if a hub can be reached.
        dtype: Type of the weights; default float32.

    Raises:
        InputError: No such directory or hub name, files or settings that ``check_base`` refuses,
            weights that are NaN or infinite. Only safetensors are read and no code from the
            checkpoint is run.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_base(path)
    loaded: Any
    try:
        with silent():
            loaded = AutoModelForCausalLM.from_pretrained(
                as_directory(path),
                dtype=dtype or torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise InputError(
            f"{path}: not loadable as a causal language model ({one_line(error)})"
        ) from error
    model: PreTrainedModel
    model, info = loaded
    check_base(path)  # of a hub name, what has just been fetched
    check_loaded(path, info, model.config)
    for name, parameter in model.named_parameters():
        if not parameter.detach().sum(dtype=torch.float64).isfinite():
            raise InputError(f"{path}: {name} has NaN or infinite weights, expected finite ones")
    return model.eval()


def load_config(path: str | Path) -> tuple[PretrainedConfig, GenerationConfig | None]:
    """Load a checkpoint's config and its generation settings (None without any); no weights.

    Raises:
        InputError: For the same reasons as ``load_base``.
    """
    from transformers import AutoConfig

    check_base(path)
    try:
        config = AutoConfig.from_pretrained(as_directory(path), trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{path}: not loadable as a model's config ({one_line(error)})") from error
    return config, load_generation(path)


def load_generation(path: str | Path) -> GenerationConfig | None:
    """A checkpoint's generation settings; None without any.

    Raises:
        InputError: A ``generation_config.json`` that cannot be read.
    """
    from transformers import GenerationConfig

    check_base_files(path)
    directory = local(path)
    if directory is not None and not (directory / GENERATION_CONFIG).exists():
        return None
    try:
        return GenerationConfig.from_pretrained(as_directory(path))
    except OSError:
        return None  # of a hub name, which has none or cannot be reached
    except Exception as error:
        raise InputError(
            f"{path}: {GENERATION_CONFIG} is not usable ({one_line(error)})"
        ) from error


def load_tokenizer(path: str | Path, model: nn.Module | None = None) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer and, if a model is given, check it against its embedding.

    Raises:
        InputError: No tokenizer, or more tokens than the model's embedding has rows.
    """
    check_base_files(path)
    tokenizer = open_tokenizer(as_directory(path))
    if model is not None:
        rows = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        if len(tokenizer) > rows:
            raise InputError(
                f"{path}: the tokenizer has {len(tokenizer)} tokens but the base's embedding has "
                f"{rows} rows; use the tokenizer that belongs to this base"
            )
    return tokenizer


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of one user turn, ready for the model to answer.

    Uses the tokenizer's chat template if it has one; otherwise the plain text, a line break
    and the special tokens that the tokenizer adds by default.

    Raises:
        InputError: As ``render_chat``.
    """
    rendered, plain = render_prompt(tokenizer, text), not tokenizer.chat_template
    with no_panic(tokenizer.name_or_path):
        return list(tokenizer.encode(rendered, add_special_tokens=plain))


def render_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text that ``encode_prompt`` encodes; give this text to a stock runner."""
    if not tokenizer.chat_template:
        return text + "\n"
    return render_chat(tokenizer, [{"role": "user", "content": text}])


def longest_context(config: PretrainedConfig) -> int:
    """The most tokens that a base was made for; a million where it states no limit (Bloom).

    Of a multimodal base, those of its text model.
    """
    text = config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or 1 << 20)


def eos_ids(model: PreTrainedModel) -> list[int]:
    """The token ids that end generation, from the model's own settings."""
    found: Any = model.generation_config.eos_token_id if model.generation_config else None
    if found is None:
        found = model.config.eos_token_id
    if found is None:
        return []
    return [int(i) for i in found] if isinstance(found, Sequence) else [int(found)]
