"""Write the generation settings of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from caliport.core.checkpoints import load_generation
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
    """Write the base's ``generation_config.json`` with the token ids that the artifact uses.

    Sampling settings stay as in the base, even those that transformers would warn about. The stock
    runners do not read the file; it is for code that loads the tokenizer with transformers.

    Args:
        base: A Hugging Face directory or hub name; without a generation config, the settings that
            its ``config.json`` implies are used.
        config: The base's configuration.
        directory: The artifact's directory.
        eos_ids: Token ids that end generation.
        bos_id: Id of the begin-of-text token, if there is one.
    """
    from transformers import GenerationConfig

    settings = load_generation(base) or GenerationConfig.from_model_config(config)
    settings._from_model_config = False  # the ids below are set explicitly
    settings.eos_token_id = eos_ids or None
    settings.bos_token_id = bos_id
    settings.to_json_file(directory / GENERATION_CONFIG)
