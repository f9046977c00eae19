"""The one exception that reaches a user as a single line."""


class InputError(Exception):
    """Something given to us is wrong; the message is one line.

    It names the file or field, what was found there and what would be right. The command line
    prints it and exits with code 2.
    """
