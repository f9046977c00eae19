"""Read and check a recipe; errors are one line that names the field and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from caliport.core.errors import InputError
from caliport.core.places import check_path
from caliport.core.untrusted import read_text, shown
from caliport.recipe.schema import Recipe
from caliport.recipe.yaml_file import parse_yaml

_BYTES = 1 << 18  # the largest recipe of ours has 4 kB
_PARENTS = 8


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: A YAML file.
        overrides: ``field.subfield=value`` with the value in YAML; each replaces a field.

    Raises:
        InputError: One line that names the field, what was found and what was expected.
    """
    check_path(path, "a recipe")
    if not path.exists():
        raise InputError(f"{path}: no such recipe; create one with `caliport init`")
    content = parse_yaml(read_text(path, _BYTES), path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: found {type(content).__name__}, expected fields and values")
    for override in overrides:
        _override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {_first(error)}") from None


def _override(content: dict[str, Any], override: str) -> None:
    field, equals, value = override.partition("=")
    if not equals or not field:
        raise InputError(f"--set {override}: expected FIELD=VALUE, such as lora.rank=16")
    *parents, last = field.split(".")
    if len(parents) > _PARENTS:
        raise InputError(f"--set {override}: expected a field of at most {_PARENTS + 1} parts")
    place = content
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise InputError(f"--set {override}: {parent} has no subfields")
    place[last] = parse_yaml(value, f"--set {field}")


def _first(error: ValidationError) -> str:
    """The first problem on one line: field, what was found, what was expected."""
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"]) or "recipe"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]), _fields(problem["loc"]), 1)
        hint = (
            f"did you mean {near[0]}?" if near else f"known: {', '.join(_fields(problem['loc']))}"
        )
        return f"{field}: unknown field; {hint}"
    if problem["type"] == "missing":
        return f"{field}: missing; expected a value"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return message if field == "recipe" else f"{field}: {message}"
    return f"{field}: found {shown(problem['input'])}, {message[0].lower()}{message[1:]}"


def _fields(location: tuple[int | str, ...]) -> list[str]:
    """The valid names for the last part of ``location``."""
    part: Any = Recipe
    for step in location[:-1]:
        if not (isinstance(part, type) and issubclass(part, BaseModel)):
            return []
        found = [f for n, f in part.model_fields.items() if step in (n, f.alias)]
        if not found:
            return []
        part = _model_in(found[0].annotation)
    if not (isinstance(part, type) and issubclass(part, BaseModel)):
        return []
    return [field.alias or name for name, field in part.model_fields.items()]


def _model_in(annotation: Any) -> Any:
    """The model inside ``X``, ``X | None`` or ``dict[str, X]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inside = [_model_in(argument) for argument in getattr(annotation, "__args__", ())]
    return next((model for model in inside if model is not None), None)
