"""A base's files, checked before any library reads them: settings, index and headers of weights.

No tensor is read and transformers is not imported, so every stage can begin with this.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from caliport.core.errors import InputError
from caliport.core.files import ADAPTER_CONFIG, CONFIG, GENERATION_CONFIG, WEIGHTS, WEIGHTS_INDEX
from caliport.core.model_files.base_settings import check_ends, check_settings
from caliport.core.model_files.gguf_base import as_directory
from caliport.core.model_files.tensor_files import StoredTensor, read_header
from caliport.core.untrusted import mapping, read_object, shown

INDEX_BYTES = 64 * 2**20
"""Most bytes of an index of weights; that of 100,000 tensors has some 10 MB."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_SMALL = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "vocab*", "merges*"]
_snapshots: dict[str, Path] = {}
_MOST_FILES = 4096
_LONGEST_NAME = 200
_FLOATS = ("F64", "F32", "F16", "BF16")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
# Tables that older releases saved with the weights; transformers computes them anew.
_BUFFER = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|cos_cached|sin_cached|position_ids|masked_bias"
    r"|attn\.bias|attention\.bias)$"
)
# What quantized checkpoints store beside or in place of a weight, by the end of its name.
_SCHEMES = (
    (r"\.weight_scale_inv$", "float8 in blocks (weight_scale_inv)"),
    (r"\.SCB$", "int8 of bitsandbytes (SCB)"),
    (r"\.(absmax|quant_map|nested_absmax|nested_quant_map)$|\.quant_state\.", "4 bits of bnb"),
    (r"\.g_idx$", "GPTQ (qweight, g_idx)"),
    (r"\.(qweight|qzeros)$", "GPTQ or AWQ (qweight, qzeros)"),
    (r"\.(weight_packed|weight_shape|weight_zero_point|weight_g_idx)$", "compressed-tensors"),
    (r"\.(W_q|qdata|_data|weight_format)$|:qdata$", "HQQ, torchao or quanto"),
    (r"\.(weight_scale|input_scale|scale_weight|weight_scale_2)$", "8 bits (weight_scale)"),
    (r"_proj_(blocks|scales)$", "MXFP4 (blocks, scales)"),
)
_SAVE_16 = "expected a base in 16 or 32 bits: use the checkpoint it was quantized from"


def check_base_files(path: str | Path) -> None:
    """Check all that can be told from a base's files without reading a weight.

    Args:
        path: A Hugging Face directory; or a hub name, of which the cached copy is checked, after
            all but its weights has been fetched; or a ``.gguf`` file, which is converted to such a
            directory.

    Raises:
        InputError: No such directory or no ``config.json``; settings that are not JSON, too large
            or out of range; an index that names files outside the directory; weights that are
            pickled, truncated or quantized; files of an adapter beside the base.
    """
    directory = local(path)
    if directory is None:
        if os.path.isabs(path) or str(path).startswith(".") or str(path).count("/") != 1:
            raise InputError(
                f"{path}: no such directory; expected a Hugging Face checkpoint or a .gguf file"
            )
        return
    _check(directory, state_of(directory), is_whole(path, directory))


def is_whole(path: str | Path, directory: Path) -> bool:
    """Whether all weights should be there: a hub name's cached copy may lack some."""
    return os.path.exists(path) or all(
        file.exists() for file in weight_files(directory) or [directory / WEIGHTS]
    )


def local(path: str | Path) -> Path | None:
    """The directory of a base: the path itself, or what a ``.gguf`` file is converted to, or the
    cached copy of a hub name, or None.

    Raises:
        InputError: See ``as_directory``.
    """
    if os.path.exists(path):
        return Path(as_directory(path))
    directory = snapshot(path)
    return directory if directory is not None and (directory / CONFIG).exists() else None


def snapshot(path: str | Path) -> Path | None:
    """The cached copy of a hub name, with all of it but weights; None if there is none.

    What is missing is fetched, once in a process, so that it can be checked before it is read.
    """
    name = str(path)
    if name in _snapshots or _HUB_NAME.fullmatch(name) is None:
        return _snapshots.get(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **{**settings, "disable": True})

    only_cached = "/" not in name  # more likely a path that was mistyped
    try:
        found = snapshot_download(
            name, allow_patterns=_SMALL, local_files_only=only_cached, tqdm_class=Silent
        )
    except Exception:  # no such name, or no hub in reach: loading it by name says which
        return None
    _snapshots[name] = Path(found)
    return _snapshots[name]


def state_of(directory: Path) -> tuple[tuple[object, ...], ...]:
    """Names, sizes and times of the files that count; equal as long as nothing changes."""
    found = []
    for entry in sorted(directory.glob("*")) if directory.is_dir() else ():
        if entry.suffix in (".json", ".safetensors", ".bin", ".pt"):
            try:
                stat = entry.stat()
            except OSError:
                continue
            found.append(
                (entry.name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            )
    return tuple(found)


def settings_of(directory: Path) -> dict[str, Any]:
    """A base's ``config.json``, checked; see ``check_base_files`` for errors."""
    path = directory / CONFIG
    if not os.path.lexists(path):
        files = sorted(directory.glob("*.gguf"))
        advice = f"; name the file {files[0].name} itself" if files else ""
        raise InputError(f"{directory}: no config.json; expected a Hugging Face checkpoint{advice}")
    settings = read_object(path, root=directory)
    check_settings(settings, path)
    return settings


def tensors_of(directory: Path) -> dict[str, StoredTensor]:
    """The tensors that transformers loads, by name; empty for a directory without weights.

    Raises:
        InputError: An index that cannot be used, two files that disagree, or see ``read_header``.
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(directory):
        for name, tensor in read_header(file, directory).items():
            if name in found:
                raise InputError(
                    f"{file}: has {shown(name)}, and so has {found[name].file.name}; expected each "
                    "tensor once"
                )
            found[name] = tensor
    return found


def weight_files(directory: Path) -> list[Path]:
    """The files of weights that transformers loads; others beside them do not count.

    Raises:
        InputError: See ``tensors_of``.
    """
    single, index = directory / WEIGHTS, directory / WEIGHTS_INDEX
    for entry in directory.glob("shard-*.safetensors"):
        if _DISTRIBUTED.fullmatch(entry.name):
            raise InputError(
                f"{entry}: part of a distributed checkpoint; expected {WEIGHTS} or its index"
            )
    if not os.path.lexists(index):
        return [single] if os.path.lexists(single) else []
    named = read_object(index, INDEX_BYTES, directory).get("weight_map")
    names = list(mapping(named, f"{index}: weight_map").values())
    for name in names:
        if (
            not isinstance(name, str)
            or not name.endswith(".safetensors")
            or name != os.path.basename(name)
            or len(name) > _LONGEST_NAME
        ):
            raise InputError(
                f"{index}: weight_map names {shown(name)}, expected a .safetensors file beside it"
            )
    files = sorted(set(names))
    if os.path.lexists(single) and files != [WEIGHTS]:
        raise InputError(
            f"{directory}: has {WEIGHTS} and an index that names {shown(files[0] if files else '')}"
            "; expected one of the two, so that all readers see the same weights"
        )
    if not files or len(files) > _MOST_FILES:
        raise InputError(
            f"{index}: weight_map names {len(files)} files, expected 1 to {_MOST_FILES}"
        )
    return [directory / name for name in files]


def is_buffer(name: str) -> bool:
    """Whether a stored tensor is a table that transformers computes anew."""
    return _BUFFER.search(name) is not None


@lru_cache(maxsize=16)
def _check(directory: Path, state: tuple[object, ...], whole: bool) -> None:
    if not directory.is_dir():
        raise InputError(
            f"{directory}: not a directory; expected a Hugging Face checkpoint or a .gguf file"
        )
    settings = settings_of(directory)
    generation = directory / GENERATION_CONFIG
    if os.path.lexists(generation):
        check_ends(read_object(generation, root=directory), settings, generation)
    if os.path.lexists(directory / ADAPTER_CONFIG):
        raise InputError(
            f"{directory / ADAPTER_CONFIG}: an adapter beside a base, which some readers would "
            "apply and others not; move the adapter into a directory of its own"
        )
    if whole:
        _check_weights(directory, settings)


def _check_weights(directory: Path, settings: Mapping[str, Any]) -> None:
    tensors = tensors_of(directory)
    if not tensors:
        pickled = [*directory.glob("*.bin"), *directory.glob("*.pt")]
        if pickled:
            raise InputError(
                f"{pickled[0]}: pickled weights, expected safetensors; convert them first"
            )
    names = sorted(tensors)
    for pattern, scheme in _SCHEMES:
        hit = next((name for name in names if re.search(pattern, name)), None)
        if hit is not None:
            raise InputError(
                f"{tensors[hit].file}: {shown(hit, 200)}: quantized, {scheme}; {_SAVE_16}"
            )
    for field in ("quantization_config", "compression_config"):
        for part in (settings, settings.get("text_config")):
            how = part.get(field) if isinstance(part, dict) else None
            if how is not None:
                method = how.get("quant_method") if isinstance(how, dict) else how
                raise InputError(
                    f"{directory / CONFIG}: {field} says {shown(method)}, a quantized base; "
                    f"{_SAVE_16}"
                )
    for name in names:
        dtype = tensors[name].dtype
        if dtype not in _FLOATS and not is_buffer(name):
            raise InputError(
                f"{tensors[name].file}: {shown(name, 200)} is stored as {shown(dtype)}, expected "
                f"{', '.join(_FLOATS)}; {_SAVE_16}"
            )
