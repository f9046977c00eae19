"""What touches the whole process is put back, and stays out of the way of other threads."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from caliport.core import patching
from caliport.core.errors import InputError
from caliport.core.patching import (
    check_tested,
    exclusive,
    is_tested,
    quiet,
    swapped,
    swapped_here,
    use_one_thread,
)
from caliport.export.quantization.integers import integers


def _in_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


class _Base:
    def method(self) -> str:
        return "base"

    @staticmethod
    def static() -> str:
        return "static"


class _Derived(_Base):
    pass


def test_a_swapped_attribute_is_put_back_as_it_was() -> None:
    with swapped(_Derived, "method", lambda self: "swapped"):
        assert _Derived().method() == "swapped"
        assert _Base().method() == "base"
    assert "method" not in vars(_Derived), "inherited again"
    with swapped(_Base, "static", lambda: "swapped"):
        assert _Base.static() == "swapped"
    assert _Base().static() == "static"
    one = _Derived()
    with pytest.raises(ZeroDivisionError), swapped(one, "method", 0):
        raise ZeroDivisionError
    assert not vars(one)
    with pytest.raises(AttributeError, match="missing"), swapped(_Base, "missing", 0):
        pass


def test_a_swap_in_one_thread_leaves_the_others_alone() -> None:
    with swapped_here(_Base, "method", lambda self: "swapped"):
        assert _Base().method() == "swapped"
        assert _in_thread(_Base().method) == "base"
    assert _Base().method() == "base"


def test_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"torch": "2.13.0+cpu", "executorch": "1.6.0a1"}
    monkeypatch.setattr(patching, "installed", found.__getitem__)
    assert is_tested(("torch==2.13.*",))
    assert not is_tested(("torch==2.13.*", "executorch==1.5.*"))
    check_tested(("torch==2.13.*",))
    with pytest.raises(InputError) as info:
        check_tested(("torch==2.13.*", "executorch==1.5.*"))
    assert str(info.value).startswith("executorch: found version 1.6.0a1, expected ==1.5.*")
    assert "\n" not in str(info.value)
    found["executorch"] = "1.6"
    assert not is_tested(("executorch==1.5.*",))


def test_what_is_not_installed_is_not_tested() -> None:
    with pytest.raises(InputError, match=re.escape("no-such-package: found version none")):
        check_tested(("no-such-package==1.*",))


def test_one_body_at_a_time_and_nested_in_one_thread() -> None:
    inside: list[int] = []
    entered = Event()

    def other() -> None:
        with exclusive():
            inside.append(2)
            entered.set()

    with exclusive(), exclusive():
        thread = Thread(target=other)
        thread.start()
        assert not entered.wait(0.05)
        inside.append(1)
    thread.join()
    assert inside == [1, 2]


def test_quiet_bodies_that_overlap_leave_the_process_loud() -> None:
    """The first to begin ends first, as in two threads."""
    before, filters = logging.root.manager.disable, list(warnings.filters)
    first, second = ExitStack(), ExitStack()
    first.enter_context(quiet())
    second.enter_context(quiet())
    first.close()
    assert logging.root.manager.disable == logging.WARNING, "one still runs"
    second.close()
    assert logging.root.manager.disable == before
    assert list(warnings.filters) == filters


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_one_thread_is_for_the_calling_thread_alone() -> None:
    def count() -> int:
        use_one_thread()
        torch.ones(1 << 20).add(1).sum()  # large enough for more than one thread
        return torch.get_num_threads()

    assert _in_thread(count) == 1
    assert torch.get_num_threads() == 2
    assert _in_thread(torch.get_num_threads) == 2, "a later thread"


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_quantizing_leaves_later_threads_their_threads(form: Any) -> None:
    weight = torch.randn(64, 32)
    seen = SimpleNamespace(counts=set())

    def rows(start: int, stop: int) -> torch.Tensor:
        seen.counts.add(torch.get_num_threads())
        return weight[start:stop]

    list(integers(rows, 64, 32, form))
    assert seen.counts == {1}, "a slice is not cut up any further"
    assert torch.get_num_threads() == 2
    assert _in_thread(torch.get_num_threads) == 2, "the second artifact's"
