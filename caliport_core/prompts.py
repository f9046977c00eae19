"""Prompt templates: the words around each input, with ``{input}`` in its place.

The template that an adapter was trained with is recorded in its manifest. An artifact of it, and
whatever asks that artifact something, take it from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from caliport.core.directories import MANIFEST, read_manifest
from caliport.core.errors import InputError
from caliport.core.untrusted import shown

PROMPT = "prompt"
"""The template's entry in a manifest."""
PLAIN = "{input}"
"""The template that adds nothing."""
_LONGEST = 20_000  # characters


def check_prompt(template: object, where: object) -> str:
    """A prompt template, checked.

    Args:
        template: The template.
        where: What to name in messages: a flag, or a file and field.

    Raises:
        InputError: Not text, too long, or without ``{input}``.
    """
    if not isinstance(template, str):
        raise InputError(f"{where} is {shown(template)}, expected text with {PLAIN}")
    if len(template) > _LONGEST:
        raise InputError(f"{where} has {len(template):,} characters, expected at most {_LONGEST:,}")
    if PLAIN not in template:
        raise InputError(f"{where} {shown(template)} has no {PLAIN}, where each input's text goes")
    try:
        template.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{where} {shown(template)} is not Unicode text") from None
    return template


def recorded_prompt(directory: Path) -> str | None:
    """The template that an adapter's manifest records; None without one.

    Raises:
        InputError: The manifest cannot be read, or what it records is no template.
    """
    path = directory / MANIFEST
    found = read_manifest(directory).get(PROMPT) if path.is_file() else None
    return None if found is None else check_prompt(found, f"{path}: {PROMPT}")


def put_in(template: str, text: str) -> str:
    """The text in its template."""
    return template.replace(PLAIN, text)


def prompted(texts: Sequence[str], given: str | None, recorded: str | None) -> list[str]:
    """Texts in the template that was given, or else in the recorded one.

    A text that has the recorded template's words around it already stays as it is.

    Raises:
        InputError: What was given is no template.
    """
    if given is not None:
        return [put_in(check_prompt(given, PROMPT), text) for text in texts]
    template = recorded or PLAIN
    before, _, after = template.partition(PLAIN)
    words = bool((before + after).strip())
    return [
        text
        if words and text.startswith(before) and text.endswith(after)
        else put_in(template, text)
        for text in texts
    ]
