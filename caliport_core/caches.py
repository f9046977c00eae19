"""Where things are kept that are made once and can be made again."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from caliport.core.errors import InputError


def cache_directory(kind: str) -> Path:
    """A directory of the user's cache; it may not be there yet.

    It lies below ``XDG_CACHE_HOME`` or ``~/.cache``; without a home that can be written, below the
    directory for temporary files.

    Args:
        kind: What is kept there.

    Raises:
        InputError: Someone else owns the place that would be used.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given) / "caliport" / kind
    home = Path(os.path.expanduser("~"))
    if home.is_absolute() and os.access(home, os.W_OK | os.X_OK):
        return home / ".cache" / "caliport" / kind
    place = Path(tempfile.gettempdir()) / f"caliport-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    found = place.lstat()
    if found.st_uid != os.getuid() or found.st_mode != stat.S_IFDIR | 0o700:
        raise InputError(f"{place}: is not this user's own; name a writable XDG_CACHE_HOME")
    return place / kind
