"""Base models and tokenizers as Hugging Face directories, read safely."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.chat_templates import render_chat
from caliport.core.errors import InputError, one_line
from caliport.core.files import CONFIG
from caliport.core.tokenizers import no_panic, open_tokenizer

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
        path: A Hugging Face directory, or a hub name if a hub can be reached.
        dtype: Type of the weights; default float32.

    Raises:
        InputError: No such directory or hub name, no ``config.json``, pickled or truncated
            weights. Only safetensors are read and no code from the checkpoint is run.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar per tensor is noise; the stages show their own
    _check_checkpoint(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:
        raise InputError(
            f"{path}: not loadable as a causal language model ({one_line(error)})"
        ) from error
    return model.eval()


def load_config(path: str | Path) -> tuple[PretrainedConfig, GenerationConfig | None]:
    """Load a checkpoint's config and its generation settings (None without any); no weights.

    Raises:
        InputError: For the same reasons as ``load_base``.
    """
    from transformers import AutoConfig, GenerationConfig

    _check_checkpoint(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{path}: not loadable as a model's config ({one_line(error)})") from error
    try:
        return config, GenerationConfig.from_pretrained(path)
    except OSError:
        return config, None


def load_tokenizer(path: str | Path, model: nn.Module | None = None) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer and, if a model is given, check it against its embedding.

    Raises:
        InputError: No tokenizer, or more tokens than the model's embedding has rows.
    """
    _check_checkpoint(path)
    tokenizer = open_tokenizer(path)
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


def eos_ids(model: PreTrainedModel) -> list[int]:
    """The token ids that end generation, from the model's own settings."""
    found: Any = model.generation_config.eos_token_id if model.generation_config else None
    if found is None:
        found = model.config.eos_token_id
    if found is None:
        return []
    return [int(i) for i in found] if isinstance(found, Sequence) else [int(found)]


def check_safetensors(path: Path) -> None:
    """Check a safetensors file's header against its size, without reading any tensor.

    Raises:
        InputError: The file is missing, empty, a pickle, truncated or not a safetensors file.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected weights as safetensors")
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= size - 8:
            if head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
                raise InputError(f"{path}: a pickle, expected safetensors; pickles are not read")
            raise InputError(f"{path}: {size} bytes and no complete header; the file is truncated")
        try:
            header = json.loads(stream.read(length))
            end = max(
                (v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise InputError(f"{path}: header is not JSON; expected a safetensors file") from None
    if size != 8 + length + end:
        raise InputError(
            f"{path}: {size} bytes, its header asks for {8 + length + end}; the file is truncated"
        )


def _check_checkpoint(path: str | Path) -> None:
    directory = Path(path)
    if not directory.exists():
        if directory.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
            raise InputError(f"{path}: no such directory; expected a Hugging Face checkpoint")
        return
    if not (directory / CONFIG).is_file():
        raise InputError(f"{path}: no config.json; expected a Hugging Face checkpoint")
    weights = list(directory.glob("*.safetensors"))
    for file in weights:
        check_safetensors(file)
    if not weights:
        pickled = [*directory.glob("*.bin"), *directory.glob("*.pt")]
        if pickled:
            raise InputError(
                f"{pickled[0]}: pickled weights, expected safetensors; convert them first"
            )
