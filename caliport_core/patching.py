"""Process-wide changes: temporary patches of third-party functions, threads, warnings.

Each patch of a third-party package is a file in a folder ``patches`` and lists in ``RELEASES`` the
releases it was tested with. With any other release, a patch that only saves time or space is
skipped (``is_tested``), and a patch that correct results need raises an error (``check_tested``).
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

    Reentrant within a thread. Threads that the body starts must not enter it: they would wait for
    the body to end.
    """
    with _patching:
        yield


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a module, class or object while the body runs.

    Raises:
        AttributeError: The owner has no such attribute: the patch does not fit the installed
            release.
    """
    getattr(owner, name)
    before = vars(owner).get(name, _MISSING)  # missing: it was inherited and will be again
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
    """Like ``swapped`` for a function or method, but other threads still call the original."""
    before, thread = getattr(owner, name), get_ident()

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (function if get_ident() == thread else before)(*args, **kwargs)

    with swapped(owner, name, chosen):
        yield


def installed(package: str) -> str:
    """The version of an installed package.

    Raises:
        importlib.metadata.PackageNotFoundError: The package is not installed.
    """
    return importlib.metadata.version(package)


def is_tested(releases: tuple[str, ...]) -> bool:
    """Whether all installed packages are releases that a patch was tested with.

    Args:
        releases: Requirements such as ``("executorch==1.5.*", "torch==2.13.*")``.
    """
    return _untested(releases) is None


def check_tested(releases: tuple[str, ...]) -> None:
    """Check that all installed packages are releases that a patch was tested with.

    Raises:
        InputError: A package is missing or another release of it is installed.
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
    """Make PyTorch use one thread in the calling thread, without changing any other thread.

    ``torch.set_num_threads`` (torch 2.13) sets the number for the calling thread and also the
    default of every later thread; the default is restored here. Call this in a new thread: the
    limit stays for the rest of its life.
    """
    import torch

    with _threads_lock:
        count = torch.get_num_threads()  # also completes this thread's lazy initialization
        torch.set_num_threads(1)
        restoring = Thread(target=torch.set_num_threads, args=(count,))
        restoring.start()
        restoring.join()


class _Quiet:
    lock = Lock()
    bodies = 0  # bodies running now, in all threads
    loud = ExitStack()  # restores warnings and logging


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Python warnings and log records below ERROR while the body runs, in any thread.

    torchao 0.18 logs every optional library it cannot load; torch 2.13 and executorch 1.5 log
    deprecations they find in each other. A user can act on none of these.
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
