"""``caliport init``: write a recipe to start from."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from caliport.core.errors import InputError
from caliport.core.places import check_new_file
from caliport.core.progress import console

_ENDING = ".yaml"


def recipes() -> list[str]:
    """Names of the recipes in the package."""
    found = files("caliport").joinpath("recipes").iterdir()
    return sorted(f.name.removesuffix(_ENDING) for f in found if f.name.endswith(_ENDING))


def write_template(path: Path, recipe: str | None = None) -> None:
    """Write a recipe to ``path``, which must not exist.

    Args:
        path: The file to write.
        recipe: One of ``recipes()``; None for the template that explains every field.

    Raises:
        InputError: An unknown recipe, or a file that already exists or cannot be written.
    """
    if recipe is None:
        source = files("caliport.flags").joinpath("template.yaml")
    elif recipe in recipes():
        source = files("caliport").joinpath("recipes", f"{recipe}{_ENDING}")
    else:
        raise InputError(f"--recipe is {recipe!r}, expected one of {', '.join(recipes())}")
    text = source.read_text(encoding="utf-8")
    check_new_file(path)
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    console.print(f"wrote {path}; next: caliport run {path}")
