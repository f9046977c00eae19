"""Names of modules in adapter files, as PEFT and other trainers write them."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass

from caliport.core.errors import InputError, printable

_LONGEST = 512
_ALLOWED = re.compile(r"[A-Za-z0-9_.\-/]+")
# Wrappers that a trainer left in the name: torch.compile, FSDP, activation checkpointing, DDP.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PREFIXES = ("base_model.model.", "module.")
_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<end>weight|bias))?"
)
_SAVED = re.compile(r"\.modules_to_save(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?=\.)")
_PARTS = {
    ("A", "weight"),
    ("B", "weight"),
    ("B", "bias"),
    ("embedding_A", None),
    ("embedding_B", None),
    ("magnitude_vector", None),
    ("magnitude_vector", "weight"),
}


@dataclass(frozen=True)
class Key:
    """What a tensor of an adapter is.

    Attributes:
        name: The module that a LoRA matrix belongs to, or the parameter that is replaced.
        part: ``A``, ``B``, ``bias`` (of B), ``embedding_A``, ``embedding_B``,
            ``magnitude_vector``, or ``parameter``.
        adapter: The adapter's name in the key, if it has one (``default``).
        copied: Whether the key says that the module was copied and trained (``modules_to_save``).
    """

    name: str
    part: str
    adapter: str | None = None
    copied: bool = False


def check_name(key: str, file: object) -> None:
    """Check that a tensor's name is one of a module's, of bounded length.

    Raises:
        InputError: It is not.
    """
    if len(key) > _LONGEST or not _ALLOWED.fullmatch(key):
        raise InputError(
            f"{file}: {printable(key, 80)}: a tensor's name of {len(key):,} characters; expected "
            f"at most {_LONGEST} letters, digits and ._-/"
        )


def parse_key(key: str, file: object) -> Key:
    """What a key of an adapter's file names.

    Prefixes of PEFT (``base_model.model.``, also missing or twice) and wrappers (``module.``,
    ``_orig_mod.``, FSDP's) are dropped.

    Raises:
        InputError: Not a name, or a part that no version of PEFT writes.
    """
    check_name(key, file)
    name = _WRAPPERS.sub("", key)
    while name.startswith(_PREFIXES):
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
    if found := _LORA.fullmatch(name):
        if (found["part"], found["end"]) in _PARTS:
            part = "bias" if found["end"] == "bias" else found["part"]
            return Key(found["module"], part, found["adapter"])
    elif ".lora_" not in name and "." in name:
        if saved := _SAVED.search(name):
            name = name[: saved.start()] + name[saved.end() :]
        adapter = saved["adapter"] if saved else None
        return Key(name.replace(".base_layer.", "."), "parameter", adapter, saved is not None)
    raise InputError(
        f"{file}: {printable(key, 80)} is not a LoRA matrix of a linear layer; refused, not dropped"
    )


def names_in(known: Container[str], names: Iterable[str], source: object) -> dict[str, str]:
    """The base's name of each name in an adapter.

    A text model may be a part of a model of text and images in the one and not in the other, so
    ``language_model`` may be missing or added, and so may the first ``model``. A name that the
    base has as it is stays; one that it has in no form stays too.

    Raises:
        InputError: Two names that mean one module of the base.
    """
    found = {name: next((n for n in _variants(name) if n in known), name) for name in names}
    seen: dict[str, str] = {}
    for name, ours in found.items():
        if seen.setdefault(ours, name) != name:
            raise InputError(f"{source}: {seen[ours]} and {name} are both {ours} of the base")
    return found


def _variants(name: str) -> list[str]:
    plain = re.sub(r"(?:^|(?<=\.))language_model\.", "", name)
    bare = plain.removeprefix("model.")
    return [
        name,
        plain,
        f"model.{plain}",
        f"model.language_model.{bare}",
        f"language_model.{plain}",
    ]
