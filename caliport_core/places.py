"""Where outputs may be written, checked before any work, and files that appear whole or not at all.

A file is replaced only if caliport wrote it, which its first bytes tell.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from caliport.core.errors import InputError, one_line, printable

FORCED: ContextVar[bool] = ContextVar("forced", default=False)
"""Whether outputs may replace what caliport did not make; see ``caliport.core.outputs.forced``."""
GENERATOR = '<meta name="generator" content="caliport">'
"""In the head of every page that caliport writes."""
_LONGEST_NAME = 200  # bytes; a file system's 255, less what temporary names add
_LONGEST_PATH = 4000  # bytes; Linux's 4096, less likewise
_HEAD = 1 << 16
_OURS = re.compile(
    r'\A\{\s*(?:"(?:name|format)":[^\n]*,\s*)?"machine":\s*\{\s*"cpu":'  # reports and baselines
    rf"|{re.escape(GENERATOR)}"
    r"|\n  --paper: #fcfbf9; --panel: #f4f2ee;"  # pages from before they had the line above
    r'|\A<\?xml [^>]*>\s*<testsuites name="caliport"'
    r"|\A## [✓?✕–] [^\n]*\n\n(?s:.*)(?: cores, | more lines; the report )"  # the summary
)


def check_path(path: Path, expected: str = "a file or directory") -> None:
    """Check that a path can be one: what is there is not looked at.

    Raises:
        InputError: It is too long or has control characters.
    """
    shown = printable(str(path), 200)
    if any(character < " " or character == "\x7f" for character in str(path)):
        raise InputError(f"{shown}: has a control character, expected the path of {expected}")
    try:
        names = [len(os.fsencode(part)) for part in path.parts]
    except UnicodeEncodeError:
        raise InputError(f"{shown}: is not text, expected the path of {expected}") from None
    if max(names, default=0) > _LONGEST_NAME or sum(names) + len(names) > _LONGEST_PATH:
        raise InputError(
            f"{shown}: is too long, expected names of at most {_LONGEST_NAME} bytes and a path of "
            f"{_LONGEST_PATH:,}"
        )


def check_place(out: Path, expected: str) -> None:
    """Check that something can be written at a path, whatever is there now.

    Args:
        out: The path.
        expected: What is to be there, for messages.

    Raises:
        InputError: See ``check_path``; or it is a link, or lies in something that is not a
            directory.
    """
    check_path(out, expected)
    try:
        if out.is_symlink():
            raise InputError(f"{out}: is a link, expected {expected}")
        places = out.absolute().parents
        above = next((p for p in places if p.exists() or p.is_symlink()), Path("/"))
    except (OSError, RuntimeError) as error:
        raise InputError(f"{out}: is not a usable path ({one_line(error)})") from None
    if not above.is_dir():
        what = "a link to nothing" if above.is_symlink() else "a file"
        raise InputError(f"{out}: {above} is {what}, expected a directory")


def check_writable(out: Path) -> None:
    """Check that something can be made at a path that passes ``check_place``.

    Raises:
        InputError: The directory that it is to lie in cannot be written.
    """
    above = next(p for p in (*out.absolute().parents, Path("/")) if p.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{out}: cannot be written: {above} is read-only; name a writable place")


def check_file(path: Path) -> None:
    """Check, before any work, that a file can be written without losing anything.

    Allowed are new files, and files that caliport wrote; in ``forced``, any regular file.

    Raises:
        InputError: See ``check_place`` and ``check_writable``; or the path is a directory or a
            device, or caliport did not write what is there.
    """
    check_place(path, "a file")
    check_writable(path)
    if not path.exists():
        return
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise InputError(f"{path}: is {what}, expected a file")
    if not FORCED.get() and not _is_ours(path):
        raise InputError(f"{path}: was not made by caliport and would be lost; name a new file")


def check_new_file(path: Path) -> None:
    """Check that a file can be written where nothing is; ``InputError`` otherwise."""
    check_place(path, "a new file")
    check_writable(path)
    if path.exists():
        raise InputError(f"{path}: already exists; choose a new file")


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD)
    except OSError:
        return False
    return not head or _OURS.search(head.decode("utf-8", "replace")) is not None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new, empty file beside ``path``, which takes its place at the end of the body.

    Its name cannot be foreseen, so that it is neither a file of the user's nor a link. If the body
    fails, it is removed and ``path`` stays as it was.

    Raises:
        OSError: The directory cannot be written.
    """
    beside = path.with_name(f"{'.' * (path.name[0] != '.')}{path.name}.{secrets.token_hex(8)}.new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    os.close(os.open(beside, flags, 0o666))
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file, which appears whole or not at all, and the directories it lies in.

    Raises:
        InputError: See ``check_file``, or the path cannot be written.
    """
    check_file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written: {error.strerror}; name a writable place"
        ) from error
    except UnicodeEncodeError:
        raise InputError(f"{path}: half a surrogate pair in its text; expected text") from None


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
