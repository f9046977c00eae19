"""The entry point: run a command, and end every invalid input with a one-line message."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

from caliport.cli.app import app
from caliport.core.errors import InputError, one_line

_INTERRUPTED = 130


def main() -> None:
    """Run the command line; invalid input ends in a one-line message."""
    debug = "--debug" in sys.argv
    goes_on = "calibrate" in sys.argv or any(a.endswith((".yaml", ".yml")) for a in sys.argv)
    sys.exit(guarded(lambda: app(standalone_mode=False), "caliport --help", debug, goes_on))


def guarded(call: Callable[[], Any], usage: str, debug: bool, goes_on: bool = False) -> int:
    """Call a command, report errors as one-line messages and return the exit code.

    Args:
        call: The command.
        usage: The command that shows its usage.
        debug: Raise internal errors with their tracebacks.
        goes_on: Whether an interrupted command can be resumed.
    """
    if not debug:  # libraries log deprecations in each other and optional parts that are missing
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    try:
        code = call()
    except InputError as error:
        code = _fail(str(error), 2)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except Exception as error:
        if debug:
            raise
        shown = getattr(error, "format_message", None)  # only click's errors have it
        if shown is not None:
            code = _fail(f"{one_line(shown(), 400)} See {usage}.", 2)
        elif type(error).__name__ == "Abort":
            code = _INTERRUPTED
        else:
            line = one_line(f"{type(error).__name__}: {error}", 300)
            code = _fail(f"internal error: {line} (--debug shows where)", 3)
    if code == _INTERRUPTED:  # typer turns Ctrl-C into this code without a message
        _fail(f"interrupted{'; run the same command again to resume' * goes_on}", code)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    print(f"caliport: {message}", file=sys.stderr)
    return code
