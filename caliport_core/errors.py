"""The one exception that reaches a user as a single line, and other errors in one line."""


class InputError(Exception):
    """Invalid input; the message is one line.

    It names the file or field, what was found there and what was expected. The command line
    prints it and exits with code 2.
    """


def one_line(error: object, most: int = 200) -> str:
    """What an error of another library says, in one line of at most ``most`` characters."""
    return " ".join(str(error).split())[:most]
