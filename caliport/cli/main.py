"""The entry point: run a command, and end every invalid input with a one-line message."""

from __future__ import annotations

import io
import logging
import os
import select
import stat
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from caliport.cli.app import app
from caliport.core.errors import InputError, one_line, unusable
from caliport.core.processes import end_on_signals, interrupted_code

_INTERRUPTED = 130
_NO_HOME = "/nonexistent"  # as Debian has it for users without one
_PIPE_CLOSED = 141  # what a shell says of a program that SIGPIPE ended


def main() -> None:
    """Run the command line; invalid input ends in a one-line message."""
    for stream in (sys.stdout, sys.stderr):  # an ASCII terminal gets ? for what it cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if not os.path.isabs(os.path.expanduser("~")):  # or libraries would keep files in ./~
        os.environ["HOME"] = _NO_HOME
    end_on_signals()
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
    piped = _is_pipe()
    try:
        code = call()
        if sys.stdout is not None:
            sys.stdout.flush()  # or a closed pipe would be found when Python ends
    except InputError as error:
        code = _fail(str(error), 2)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except BaseException as error:  # a panic of a library in Rust is no Exception
        # rich and typer turn a closed pipe into exit code 1, which says that a gate failed
        if piped and _reader_is_gone() and isinstance(error, BrokenPipeError | SystemExit):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return _PIPE_CLOSED
        if debug or isinstance(error, SystemExit):
            raise
        shown = getattr(error, "format_message", None)  # only click's errors have it
        if shown is not None:
            code = _fail(f"{one_line(shown(), 400)} See {usage}.", 2)
        elif type(error).__name__ == "Abort":
            code = _INTERRUPTED
        elif (problem := unusable(error)) is not None:
            code = _fail(one_line(problem, 400), 2)
        else:
            line = one_line(f"{type(error).__name__}: {error}", 300)
            code = _fail(f"internal error: {line} (--debug shows where)", 3)
    if code == _INTERRUPTED:  # typer turns Ctrl-C into this code without a message
        code = interrupted_code()
        _fail(f"interrupted{'; run the same command again to resume' * goes_on}", code)
    return code if isinstance(code, int) else 0


def _is_pipe() -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(1).st_mode)
    except OSError:
        return False


def _reader_is_gone() -> bool:
    """Whether standard output, a pipe at first, has no reader any more, or rich replaced it."""
    if not _is_pipe():
        return True
    state = select.poll()
    state.register(1, 0)
    return any(events & select.POLLERR for _, events in state.poll(0))


def _fail(message: str, code: int) -> int:
    if sys.stderr is not None:
        with suppress(OSError):  # a terminal that was closed, a log on a full disk
            print(f"caliport: {message}", file=sys.stderr, flush=True)
    return code
