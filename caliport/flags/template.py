"""XXX."""

from __future__ import annotations

from pathlib import Path

from caliport.core.errors import InputError
from caliport.core.progress import console


def write_template(path: Path) -> None:
    """Write the commented recipe to ``path``, which must not be there yet."""
    from importlib.resources import files

    text = files("caliport.flags").joinpath("template.yaml").read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise InputError(f"{path}: is there already; name a new file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    console.print(f"wrote {path}; next: caliport run {path}")
