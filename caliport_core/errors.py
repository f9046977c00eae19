"""``InputError``, which reaches a user as a single line, and other errors on one line."""


class InputError(Exception):
    """Invalid input; the message is one line.

    It names the file or field, what was found there and what was expected. The command line
    prints it and exits with code 2.
    """


def one_line(error: object, most: int = 200) -> str:
    """Another library's error message on one line, cut to ``most`` characters."""
    return " ".join(str(error).split())[:most]
