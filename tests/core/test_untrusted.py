"""What a stranger's file may be, and what every reader refuses in one printable line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caliport.core.errors import InputError, one_line, printable
from caliport.core.untrusted import (
    check_inside,
    mapping,
    number,
    parse_json,
    read_bytes,
    read_json,
    read_object,
    read_text,
    shown,
)


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null", "pipe", "directory", "gone", "large"])
def test_only_regular_files_of_bounded_size_are_read(place: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if place.startswith("/"):
        path.symlink_to(place)
    elif place == "pipe":
        os.mkfifo(path)
    elif place == "directory":
        path.mkdir()
    elif place == "large":
        path.write_bytes(b" " * 101)
    with pytest.raises(InputError, match=r"config\.json"):
        read_bytes(path, 100)


def test_a_link_out_of_the_directory_is_refused_and_a_hub_cache_is_not(tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_text("{}")
    inside = tmp_path / "base"
    inside.mkdir()
    (inside / "config.json").symlink_to("../secret")
    with pytest.raises(InputError, match="outside"):
        read_text(inside / "config.json", root=inside)
    with pytest.raises(InputError, match="outside"):
        check_inside(inside / "../secret", inside)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "cafe").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/cafe")
    assert read_json(snapshot / "config.json", root=snapshot) == {}


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "NaN", "[-Infinity]", "1e999", "9" * 5000, "\ufeff{}"),
        *("[" * 10_000, "[" * 65 + "]" * 65),
        *('"\\ud800"', '{"\\udc00": 1}', '{"a": [{"b": "\\ud800"}]}'),
    ],
)
def test_not_json(text: str) -> None:
    with pytest.raises(InputError, match=r"^here: "):
        parse_json(text, "here")


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_all_other_json_is_read(value: Any) -> None:
    assert parse_json(json.dumps(value), "here") == value


def test_an_object_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(InputError, match="found list, expected a JSON object"):
        read_object(tmp_path / "a.json")
    with pytest.raises(InputError, match="expected an object"):
        mapping([], "a.json: x")


@pytest.mark.parametrize("value", [True, None, "1", 0, 11, -1, float("nan"), 10**400, [1]])
def test_numbers_out_of_range(value: object) -> None:
    with pytest.raises(InputError, match="expected a number from 1 to 10"):
        number(value, "x", 1, 10)


def test_a_fraction_is_no_rank() -> None:
    assert number(2.5, "x", 1, 10) == 2.5
    with pytest.raises(InputError, match=r"x is 2\.5, expected an integer"):
        number(2.5, "x", 1, 10, whole=True)


@given(st.text(st.characters(), max_size=50), st.integers(1, 60))
def test_shown_text_is_printable_and_short(text: str, most: int) -> None:
    for line in (printable(text), str(InputError(text)), one_line(text)):
        assert line.isprintable()
        line.encode("utf-8")
    assert shown(text, most).isprintable()


@given(st.text(st.characters(categories=["L", "N", "P", "S"])))
def test_words_of_any_language_stay(text: str) -> None:
    kept = [c for c in text if c.isprintable()]
    assert all(c in printable(text) for c in kept)


def test_a_message_is_cut() -> None:
    assert len(str(InputError("x" * 10**6))) <= 2000
    assert shown(10**5000) == "an integer of more than 18 digits"
    assert shown({str(i): i for i in range(99)}) == "a dict of 99 entries"
    assert len(shown("y" * 10**6)) <= 60
