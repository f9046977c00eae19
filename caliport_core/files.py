"""Names of files that transformers, PEFT, mlx-lm and tokenizers define, and the hash of a file."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"

_HASHES: dict[tuple[int, ...], str] = {}
_SETTLED = 100_000_000  # nanoseconds; longer than one tick of a file system's clock


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal, read in chunks.

    Hashes are cached per process by inode, size and times, so a file that was only renamed with
    its directory is not read again.
    """
    found = path.stat()
    state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    if state in _HASHES:
        return _HASHES[state]
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if time.time_ns() - found.st_ctime_ns > _SETTLED:  # else it may change within the same tick
        _HASHES[state] = digest
    return digest
