from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from caliport_core.errors import InputError
from tests.validation import examples
from validation.plots import size
from validation.report import headline, write_report
from validation.results import LATENCY, PARITY, QUALITY, write_result

_VOID = {"meta", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """Collects what a browser would load or run, ids, and tags left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.tags: Counter[str] = Counter()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids[value or ""] += 1
            if name in ("src", "srcset", "data", "action") or (tag == "link" and name == "href"):
                self.loads.append(value or "")
            if name in ("href", "xlink:href") and value is not None:
                self.links.append(value)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag


def render(directory: Path, *, quality: bool, parity: bool, latency: bool, failing: bool) -> str:
    if quality:
        write_result(examples.quality(), directory / QUALITY)
    if parity:
        write_result(examples.parity(failing), directory / PARITY)
    if latency:
        write_result(examples.latency(), directory / LATENCY)
    return write_report(directory).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("quality", "parity", "latency", "failing"),
    [
        (True, True, True, False),
        (True, True, True, True),
        (True, False, False, False),
        (False, True, False, True),
        (False, False, True, False),
    ],
)
def test_any_set_of_files_makes_a_sound_self_contained_page(
    tmp_path: Path, quality: bool, parity: bool, latency: bool, failing: bool
) -> None:
    text = render(tmp_path, quality=quality, parity=parity, latency=latency, failing=failing)
    page = Page(text)
    assert page.open == []
    assert page.loads == []
    assert page.tags["script"] == page.tags["iframe"] == 0
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert max(page.ids.values()) == 1
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert page.tags["svg"] == 3 * quality + 2 * parity + 2 * latency
    for name, there in ((QUALITY, quality), (PARITY, parity), (LATENCY, latency)):
        assert (f"No <code>{name}</code>" in text) is not there
    assert not re.search(r"#0[1-4]0[0-4]0\d", text), "a plot's colour does not follow the page"


def test_text_of_models_is_shown_and_never_run(tmp_path: Path) -> None:
    text = render(tmp_path, quality=True, parity=True, latency=False, failing=True)
    assert text.count("&lt;script&gt;alert(&#39;ß&#39;)&lt;/script&gt; &amp; $x^2$") >= 4
    assert "LC++ $5 (20 steps)" in text


def test_a_failure_is_on_top_with_its_stage(tmp_path: Path) -> None:
    text = render(tmp_path, quality=True, parity=True, latency=False, failing=True)
    verdict = text[text.index('<section class="verdict') : text.index('<section id="methods"')]
    assert "1 of 2 artifacts failed" in verdict
    assert "<b>describe in German, ONNX int4</b> lost it at <b>lowering</b>" in verdict
    assert "(and 1 more)" in verdict
    assert text.count('<tr class="failed"') == 1
    assert text.count('<tr class="why">') == 1


def test_headline_says_what_is_known() -> None:
    artifacts = examples.parity().artifacts
    assert headline([]).state == "none"
    assert headline(artifacts).text == "4 gates passed on 2 artifacts."
    artifacts[0].gates.append(examples.gate("task", "quantization", decided=False))
    assert headline(artifacts).state == "unsure"
    assert "1 of 5 gates had too few examples to say" in headline(artifacts).text
    assert headline(examples.parity(failing=True).artifacts).state == "fail"


def test_nothing_to_report_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no quality\.json, parity\.json or latency\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (14e6, "14 MB"), (2.5e9, "2.5 GB")],
)
def test_sizes_are_for_people(count: float, text: str) -> None:
    assert size(count) == text
