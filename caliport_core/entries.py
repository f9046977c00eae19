"""Registries with one file per entry: merges, corrections, quantizers.

An entry's name is its file name with ``+`` for ``_plus`` and ``-`` for any other ``_``:
``lm_cocktail.py`` is ``lm-cocktail``, ``lc_plus_plus.py`` is ``lc++``. Listing the names imports
none of the files, so command-line help can list them without torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import TypeVar

Entry_co = TypeVar("Entry_co", covariant=True)


class Entries(Mapping[str, Entry_co]):
    """The entries of a package by name, in alphabetical order, each imported on first access.

    Args:
        package: Full name of the package.
        attribute: Name of the entry in each module.
        helpers: Modules of the package that are not entries.
    """

    def __init__(self, package: str, attribute: str, helpers: Collection[str]) -> None:
        self._package, self._attribute = package, attribute
        found = iter_modules(import_module(package).__path__)
        files = sorted(m.name for m in found if not m.ispkg and m.name not in helpers)
        self._files = {file.replace("_plus", "+").replace("_", "-"): file for file in files}

    def __getitem__(self, name: str) -> Entry_co:
        entry: Entry_co = getattr(
            import_module(f"{self._package}.{self._files[name]}"), self._attribute
        )
        return entry

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
