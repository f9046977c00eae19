"""Changes to the whole process: third-party functions replaced for a while, threads, warnings.

Each patch of a third-party package is a file in a folder ``patches`` and says in ``RELEASES`` which
releases it was written for and tested with. With another release installed, a patch that only saves
time or space is left out (``is_tested``), and one without which the result would be wrong refuses
to work (``check_tested``).
"""

from __future__ import annotations

import importlib.metadata
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock, RLock, Thread, get_ident
from typing import Any

from packaging.requirements import Requirement

from caliport.core.errors import InputError

_patching = RLock()
_threads_lock = Lock()
_MISSING = object()


@contextmanager
def exclusive() -> Iterator[None]:
    """Run the body while no other thread runs one; for code that patches the whole process.

    A thread may enter again what it has entered. What the body starts in threads of its own must
    not enter.
    """
    with _patching:
        yield


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute of a module, class or object another value while the body runs.

    Raises:
        AttributeError: The owner has no such attribute: a patch does not fit what is installed.
    """
    getattr(owner, name)
    before = vars(owner).get(name, _MISSING)  # an inherited one goes back to being inherited
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def swapped_here(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """As ``swapped``, for a function or method: other threads still call the former one."""
    before, thread = getattr(owner, name), get_ident()

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (function if get_ident() == thread else before)(*args, **kwargs)

    with swapped(owner, name, chosen):
        yield


def installed(package: str) -> str:
    """The version of an installed package.

    Raises:
        importlib.metadata.PackageNotFoundError: It is not installed.
    """
    return importlib.metadata.version(package)


def is_tested(releases: tuple[str, ...]) -> bool:
    """Whether every package is installed in a release that a patch was tested with.

    Args:
        releases: Such as ``("executorch==1.5.*", "torch==2.13.*")``.
    """
    return _untested(releases) is None


def check_tested(releases: tuple[str, ...]) -> None:
    """Check that every package is installed in a release that a patch was tested with.

    Raises:
        InputError: One is not.
    """
    if message := _untested(releases):
        raise InputError(message)


def _untested(releases: tuple[str, ...]) -> str | None:
    for text in releases:
        wanted = Requirement(text)
        try:
            found = installed(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found == "none" or not wanted.specifier.contains(found, prereleases=True):
            return (
                f"{wanted.name}: found version {found}, expected {wanted.specifier}: exporting "
                "changes what this package does and was tested with that release only"
            )
    return None


def use_one_thread() -> None:
    """Let PyTorch compute with one thread in the calling thread, and in no other.

    ``torch.set_num_threads`` (torch 2.13) sets the number of the calling thread and also the number
    that every later thread begins with; the second is put back. The calling thread must be new:
    one that is to stay at one thread.
    """
    import torch

    with _threads_lock:
        count = torch.get_num_threads()  # also ends this thread's own, lazy initialization
        torch.set_num_threads(1)
        restoring = Thread(target=torch.set_num_threads, args=(count,))
        restoring.start()
        restoring.join()


class _Quiet:
    lock = Lock()
    bodies = 0  # that run now, in all threads
    loud = ExitStack()  # what makes the process loud again


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Python warnings and log records below ERROR while the body runs, in any thread.

    torchao 0.18 logs every optional library it cannot load, torch 2.13 and executorch 1.5 log each
    deprecation they meet in one another. None of it is anything a user can act on.
    """
    with _Quiet.lock:
        if not _Quiet.bodies:
            _Quiet.loud.callback(logging.disable, logging.root.manager.disable)
            _Quiet.loud.enter_context(warnings.catch_warnings())
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")
        _Quiet.bodies += 1
    try:
        yield
    finally:
        with _Quiet.lock:
            _Quiet.bodies -= 1
            if not _Quiet.bodies:
                _Quiet.loud.close()
