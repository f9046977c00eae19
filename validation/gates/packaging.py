"""Are the files beside the program the base's own: tokenizer, chat template, ends, settings?

They are compared with what the exporter writes for the base, by the installed libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from caliport.core.checkpoints import eos_ids, load_config, load_tokenizer
from caliport.core.errors import InputError, one_line
from caliport.core.files import GENERATION_CONFIG, TOKENIZER
from caliport.core.untrusted import TOKENIZER_BYTES, parse_json, read_bytes, read_object
from caliport.export.artifact import Artifact
from caliport.export.package.generation import save_generation_config
from caliport.export.package.tokenizer import read_tokenizer, save_tokenizer
from caliport.validation.evaluation.prompts import TEXTS
from caliport.validation.records.gate import Gate
from caliport.validation.runners import engine as engines

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SHOWN = 6  # names of what differs
_ENDS = "eos_token_id"
_ATTRIBUTES = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "clean_up_tokenization_spaces",
)


def packaging_gates(artifact: Artifact, base: str | Path) -> list[Gate]:
    """Compare tokenizer, chat template, end of text and settings with the base's.

    Args:
        artifact: One of ours.
        base: A Hugging Face directory or hub name.

    Raises:
        InputError: The base or a file of the artifact cannot be read.
    """
    theirs, model = load_tokenizer(base), _shell(base)
    ends = eos_ids(model)
    with TemporaryDirectory(prefix="caliport-packaging-") as scratch:
        made = Path(scratch)
        save_tokenizer(theirs, made)
        save_generation_config(base, model.config, made, ends, theirs.bos_token_id)
        expected_parts, wanted = _parts(made), _generation(made)
    try:
        ours = read_tokenizer(artifact.directory)
        parts = _differing(_parts(artifact.directory), expected_parts)
    except InputError as problem:
        return [_gate("tokenizer", 1, str(problem))]
    try:
        written = _generation(artifact.directory)
    except InputError as problem:
        return [_gate("settings", 1, str(problem))]
    found = sorted(engines.get(artifact.runtime).ends(artifact))
    read = _ids(written.pop(_ENDS, None))
    expected = sorted(ends)
    wrong = found if found != expected else read
    odd = [
        *engines.get(artifact.runtime).differing_settings(artifact, model, theirs),
        *_manifest_settings(artifact, model),
        *(f"{GENERATION_CONFIG}: {name}" for name in _differing(written, _without_ends(wanted))),
    ]
    return [
        _gate("tokenizer", *_texts(ours, theirs, parts)),
        _gate(
            "chat template",
            int(ours.chat_template != theirs.chat_template),
            "a prompt is rendered as the base renders it",
        ),
        _gate("ends", int(wrong != expected), f"a text ends at {wrong}, the base's at {expected}"),
        _gate("settings", len(odd), _named(odd) or "context, vocabulary and sampling are as given"),
    ]


def _gate(name: str, found: int, reason: str) -> Gate:
    return Gate(
        name=name,
        measure="differences from the base's",
        limit=0,
        found=found,
        passed=not found,
        stage="packaging",
        reason=reason,
    )


def _texts(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, parts: list[str]
) -> tuple[int, str]:
    """How many texts, entries of the vocabulary, settings and parts of the file differ."""
    texts = sum(ours.encode(text) != theirs.encode(text) for text in TEXTS)
    mine, base = ours.get_vocab(), theirs.get_vocab()
    entries = sum(mine.get(token) != number for token, number in base.items())
    entries += len(mine.keys() - base.keys())
    settings = [
        name for name in _ATTRIBUTES if getattr(ours, name, None) != getattr(theirs, name, None)
    ]
    reason = (
        f"{texts} of {len(TEXTS)} texts are encoded otherwise, {entries} entries of the vocabulary "
        f"differ{_and(settings)}{_and([f'{TOKENIZER}: {part}' for part in parts])}"
    )
    return texts + entries + len(settings) + len(parts), reason


def _and(names: list[str]) -> str:
    return f"; so do {_named(names)}" if names else ""


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return one_line(", ".join(names[:_SHOWN]), 400) + more


def _parts(directory: Path) -> Mapping[str, Any]:
    """The parts of a ``tokenizer.json``, such as its normalizer, as the library writes them."""
    from tokenizers import Tokenizer

    path = directory / TOKENIZER
    content = read_bytes(path, TOKENIZER_BYTES, directory)
    try:
        text = Tokenizer.from_buffer(content).to_str()
    except Exception as error:
        raise InputError(f"{path}: not a tokenizer ({one_line(error)})") from error
    found: Mapping[str, Any] = parse_json(text, path)
    return found


def _generation(directory: Path) -> dict[str, Any]:
    found = read_object(directory / GENERATION_CONFIG, root=directory)
    found.pop("transformers_version", None)
    return found


def _without_ends(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != _ENDS}


def _ids(found: object) -> list[Any]:
    ids = found if isinstance(found, list) else [] if found is None else [found]
    return sorted(ids, key=str) if any(type(i) is not int for i in ids) else sorted(ids)


def _differing(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    names = sorted(found.keys() | expected.keys())
    return [name for name in names if found.get(name) != expected.get(name)]


def _manifest_settings(artifact: Artifact, model: PreTrainedModel) -> list[str]:
    """Fields of the manifest that cannot be, given the base."""
    config = model.config.get_text_config()
    context, longest = artifact.context, getattr(config, "max_position_embeddings", None)
    sizes: dict[str, Callable[[Any], bool]] = {
        "vocab_size": lambda size: size == config.vocab_size,
        "hidden_size": lambda size: size == config.hidden_size,
        "layers": lambda size: size == config.num_hidden_layers,
    }
    stated = artifact.manifest.get("base", {})
    odd = [
        f"manifest.json: base.{name}"
        for name, fits in sizes.items()
        if name in stated and not fits(stated[name])
    ]
    if context is None or (longest is not None and context > longest):
        odd.append("manifest.json: context")
    return odd


def _shell(base: str | Path) -> PreTrainedModel:
    """The base without its weights."""
    from caliport.export.decoder.skeleton import empty

    config, generation = load_config(base)
    model = empty(config)
    if generation is not None:
        model.generation_config = generation
    return model
