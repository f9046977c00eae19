"""Save a tokenizer so that transformers and the stock runners read it, and read it back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from caliport.core.errors import InputError
from caliport.core.files import TOKENIZER
from caliport.core.model_files.tokenizers import open_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the tokenizer files of an artifact, as transformers saves them.

    ExecuTorch's runner reads ``tokenizer.json``; onnxruntime_genai 0.18 reads it too, together
    with ``tokenizer_config.json`` (it knows transformers 5's class ``TokenizersBackend``) and
    ``chat_template.jinja``. A test checks that both give the same tokens as transformers.

    Raises:
        InputError: The tokenizer cannot be saved as ``tokenizer.json``, which every stock runner
            needs.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{tokenizer.name_or_path}: {type(tokenizer).__name__} cannot be saved as {TOKENIZER}; "
            "expected a tokenizer of the tokenizers library, which the stock runners read"
        )
    tokenizer.save_pretrained(directory)


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an artifact directory; no code in it runs.

    Raises:
        InputError: See ``open_tokenizer``.
    """
    return open_tokenizer(directory)
