"""The generation settings that travel with an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from caliport.core.files import GENERATION_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def save_generation_config(
    base: str | Path,
    config: PreTrainedConfig,
    directory: Path,
    eos_ids: list[int],
    bos_id: int | None,
) -> None:
    """Write the base's ``generation_config.json`` with the ids that the artifact itself uses.

    Sampling settings are the base's own, also where transformers would warn of them. The stock
    runners do not read the file; it is for whoever loads the tokenizer with transformers.

    Args:
        base: A Hugging Face directory or hub name; one without a generation config gives the
            settings that its ``config.json`` implies.
        config: The base's configuration.
        directory: Of the artifact.
        eos_ids: Token ids that end a generation.
        bos_id: The token id that begins a text, if there is one.
    """
    from transformers import GenerationConfig

    try:
        settings = GenerationConfig.from_pretrained(base)
    except OSError:
        settings = GenerationConfig.from_model_config(config)
    settings._from_model_config = False  # what follows is said outright
    settings.eos_token_id = eos_ids or None
    settings.bos_token_id = bos_id
    settings.to_json_file(directory / GENERATION_CONFIG)
