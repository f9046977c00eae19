"""Do a base's weights fit the model of its ``config.json``, as transformers would load it?

The model is built and "loaded" on the ``meta`` device, from the headers of the weights alone. So
transformers itself says which names it renames, ignores, misses and does not expect.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.errors import InputError, one_line, printable
from caliport.core.files import CONFIG, GENERATION_CONFIG, WEIGHTS
from caliport.core.model_files.base_files import (
    check_base_files,
    is_buffer,
    is_whole,
    local,
    state_of,
    tensors_of,
)
from caliport.core.model_files.base_settings import check_ends
from caliport.core.model_files.tensor_files import StoredTensor
from caliport.core.patching import exclusive
from caliport.core.untrusted import read_object

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_BUFFER_BYTES = 2**31
_ROWS = 1024
_WRAPPERS = {
    "base_model.model.": "PEFT: merge the adapter and save the base alone",
    "_orig_mod.": "torch.compile: save the model that was compiled",
    "module.": "DataParallel: save the model inside",
    "_fsdp_wrapped_module.": "FSDP: save the model inside",
}


def check_base(path: str | Path) -> None:
    """Check a base before any stage works on it; reads headers and settings, no weights.

    Args:
        path: A Hugging Face directory; or a hub name, of which the cached copy is checked, if all
            of it is there.

    Raises:
        InputError: See ``check_base_files``; a model that transformers cannot build; weights that
            the model misses, does not expect or that have another shape; a stored head that
            differs from the embedding that it is tied to.
    """
    check_base_files(path)
    directory = local(path)
    if directory is not None and is_whole(path, directory):
        _check(directory, state_of(directory))


def check_loaded(path: str | Path, info: Mapping[str, Any], config: PretrainedConfig) -> None:
    """Check what transformers says about the names and shapes of a checkpoint that it loaded.

    Args:
        path: The checkpoint, for messages.
        info: ``output_loading_info`` of ``from_pretrained``.
        config: The model's config.

    Raises:
        InputError: Weights that are missing, not expected or of another shape.
    """
    unexpected = sorted(name for name in info["unexpected_keys"] if not is_buffer(name))
    missing = sorted(info["missing_keys"])
    for prefix, advice in _WRAPPERS.items():
        hit = next((name for name in unexpected if prefix in name), None)
        if hit is not None and missing:
            raise InputError(f"{path}: {_named(hit)} has a prefix of {advice}")
    if unexpected or missing:
        _check_layers(path, missing, unexpected, config)
    if missing:
        raise InputError(
            f"{path}: no {_named(missing[0])}{_more(missing)}, which the model of config.json has; "
            f"expected all its weights{_head_advice(missing)}"
        )
    if unexpected:
        raise InputError(
            f"{path}: {_named(unexpected[0])}{_more(unexpected)} is not in the model of "
            "config.json; expected the config.json that belongs to these weights"
        )
    for name, stored, wanted in sorted(info["mismatched_keys"], key=lambda entry: str(entry[0])):
        raise InputError(
            f"{path}: {_named(name)} is {list(stored)}, the model of config.json has {list(wanted)}"
        )
    if info.get("error_msgs"):
        raise InputError(f"{path}: not loadable ({one_line(info['error_msgs'][0])})")


@contextmanager
def silent() -> Iterator[None]:
    """While the body runs, transformers reports only errors: ours say the same in one line."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar per tensor is noise; the stages show their own
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@lru_cache(maxsize=16)
def _check(directory: Path, state: tuple[object, ...]) -> None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            f"{directory}: not loadable as a model's config ({one_line(error)})"
        ) from error
    if config.is_encoder_decoder:  # it also loads as a causal one, with some random weights
        raise InputError(
            f"{directory}: a sequence-to-sequence model, expected a causal language model, a "
            "decoder alone (is_encoder_decoder)"
        )
    for name in (CONFIG, GENERATION_CONFIG):
        if (directory / name).is_file():  # the size of the vocabulary may be the model's default
            check_ends(
                read_object(directory / name, root=directory),
                {"vocab_size": getattr(config.get_text_config(), "vocab_size", None)},
                directory / name,
            )
    tensors = tensors_of(directory)
    if not tensors:
        raise InputError(f"{directory}: no weights; expected {WEIGHTS} or its index")
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(tensors):
        _check_layers(directory, ["."], sorted(tensors), config)
    model, info = _on_meta(directory, config, tensors)
    check_loaded(directory, info, config)
    size = sum(buffer.nbytes for buffer in model.buffers())
    if size > _BUFFER_BYTES:
        raise InputError(
            f"{directory / CONFIG}: asks for {size / 1e9:.1f} GB of tables that are not in the "
            "weights; expected a model of usual lengths"
        )
    for target, source in (model.all_tied_weights_keys or {}).items():
        _check_tied(directory, tensors, target, source)


def _on_meta(
    directory: Path, config: PretrainedConfig, tensors: Mapping[str, StoredTensor]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    stored = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    try:
        with exclusive(), silent():
            with torch.device("meta"):
                shell = AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, trust_remote_code=False
                )
            model, info = type(shell).from_pretrained(
                None,
                config=shell.config,
                state_dict=stored,
                device_map={"": "meta"},
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise InputError(
            f"{directory}: not loadable as a causal language model ({one_line(error)})"
        ) from error
    return model, info


def _check_layers(
    path: str | Path, missing: list[str], unexpected: list[str], config: PretrainedConfig
) -> None:
    """Say it where weights and config differ in the number of layers only."""
    wanted = int(config.get_text_config().num_hidden_layers)
    indices = [
        {int(found[1]) for name in names if (found := re.search(r"\.(\d{1,9})\.", name))}
        for names in (missing, unexpected)
    ]
    if missing == ["."]:
        stored = len(indices[1])
    elif indices[1] and not missing and min(indices[1]) == wanted:
        stored = max(indices[1]) + 1
    elif indices[0] and not unexpected and max(indices[0]) == wanted - 1:
        stored = min(indices[0])
    else:
        return
    raise InputError(
        f"{path}: config.json says num_hidden_layers {wanted}, the weights have {stored} layers"
    )


def _check_tied(
    directory: Path, tensors: Mapping[str, StoredTensor], target: str, source: str
) -> None:
    """Check that tied weights that are stored twice are equal."""
    import torch
    from safetensors import safe_open

    names = [
        next((stored for stored in (full, full.partition(".")[2]) if stored in tensors), None)
        for full in (target, source)
    ]
    if None in names:
        return
    first, second = (tensors[name] for name in names if name is not None)
    with safe_open(first.file, "pt") as one, safe_open(second.file, "pt") as other:
        left, right = one.get_slice(names[0]), other.get_slice(names[1])
        equal = first.shape == second.shape and all(
            torch.equal(left[start : start + _ROWS].float(), right[start : start + _ROWS].float())
            for start in range(0, first.shape[0], _ROWS)
        )
    if not equal:
        raise InputError(
            f"{directory / CONFIG}: tie_word_embeddings is true, but {first.file.name} has a "
            f"{names[0]} that differs from {names[1]}; expected tie_word_embeddings false, or "
            f"weights without {names[0]}"
        )


def _named(name: str) -> str:
    return printable(str(name), 200)


def _more(names: Collection[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _head_advice(missing: list[str]) -> str:
    if missing != ["lm_head.weight"]:
        return ""
    return ", or tie_word_embeddings true if the embedding is its head"
