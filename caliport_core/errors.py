"""``InputError``, which reaches a user as a single line, and text from elsewhere on one line."""

import errno
import os

UNUSABLE = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
        *(errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETXTBSY),
    }
)
"""Numbers of errors of the system that a user can mend: no room, no permission, a bad disk."""
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\xa0\u2028\u2029\u3000"
_LONGEST = 2000  # characters of a message; room for two long paths


class InputError(Exception):
    """Invalid input; the message is one printable line.

    It names the file or field, what was found there and what was expected. The command line
    prints it and exits with code 2.
    """

    def __init__(self, message: object) -> None:
        super().__init__(printable(str(message), _LONGEST))


class Diverged(InputError):
    """A training whose loss or gradient is no number any more: its learning rate is too high."""


def unusable(error: BaseException) -> str | None:
    """The message for an error of the system that a user can mend; None of any other error."""
    if isinstance(error, FileNotFoundError) and error.filename is None and error.strerror:
        return f"{error.strerror}; set TMPDIR to a writable directory"  # tempfile's, with no place
    number, place = system_error(error), getattr(error, "filename", None) or "output"
    if number is None:
        return None
    return f"{place}: {os.strerror(number)}"


def system_error(error: BaseException) -> int | None:
    """The number of an error of the system that a user can mend; None of any other error.

    Libraries have errors of their own for a full or bad disk, with its text or raised while the
    system's was handled.
    """
    if isinstance(error, OSError) and error.errno in UNUSABLE:
        return error.errno
    first: BaseException | None = error
    while first is not None:
        for number in _DISK:
            if getattr(first, "errno", None) == number or os.strerror(number) in str(first):
                return number
        first = first.__cause__ or first.__context__
    return None


def one_line(error: object, most: int = 200) -> str:
    """Another library's error message on one printable line, cut to ``most`` characters."""
    return printable(" ".join(str(error)[: 10 * most].split()), most)


def printable(text: str, most: int = 400) -> str:
    """Text on one line without control characters, cut to ``most`` characters.

    White space becomes a space; other characters that are not printable (escape codes, direction
    marks, halves of surrogate pairs) become ``\\x1b`` or the like.
    """
    short = text if len(text) <= most else text[: most - 1] + "…"
    spaced = "".join(" " if c in _SPACES else c for c in short)
    return "".join(c if c.isprintable() else _escaped(c) for c in spaced)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
