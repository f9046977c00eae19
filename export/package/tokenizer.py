"""Save a tokenizer so that transformers and the stock runners of both runtimes read it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from caliport.core.errors import InputError
from caliport.core.files import TOKENIZER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the tokenizer files of an artifact: what transformers itself saves.

    ExecuTorch's runner reads ``tokenizer.json``; onnxruntime_genai 0.18 reads it too, together
    with ``tokenizer_config.json`` (it knows transformers 5's class ``TokenizersBackend``) and
    ``chat_template.jinja``. A test holds both to the tokens that transformers gives.

    Raises:
        InputError: The tokenizer has no ``tokenizer.json`` form, which every stock runner needs.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{tokenizer.name_or_path}: {type(tokenizer).__name__} cannot be saved as {TOKENIZER}; "
            "expected a tokenizer of the tokenizers library, which the stock runners read"
        )
    tokenizer.save_pretrained(directory)
