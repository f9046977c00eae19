from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from caliport.core.errors import InputError
from caliport.validation.records.audit import (
    AdapterPart,
    AngleCosines,
    AuditedMerge,
    AuditedModule,
    AuditReport,
    CompositionAudit,
    MergeError,
    PairOverlap,
)
from caliport.validation.records.reports import AUDIT, LATENCY, PARITY, QUALITY, write_result
from caliport.validation.report.budget_summary import lost_and_gained
from caliport.validation.report.headline import headline
from caliport.validation.report.names import size
from caliport.validation.report.page import marked, write_report
from tests.validation import examples

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


def audited_module(layer: int | None, component: str) -> AuditedModule:
    space = AngleCosines(mean=0.4, highest=0.9, chance=0.25)
    part = AdapterPart(norm=1.5, rank=8, numerical_rank=8, effective_rank=6.4)
    return AuditedModule(
        name=component if layer is None else f"model.layers.{layer}.mlp.{component}",
        layer=layer,
        component=component,
        shape=(16, 8),
        sum_norm=2.0,
        adapters={"describe": part, "to <b>German</b>": part},
        overlaps=[
            PairOverlap(
                first="describe",
                second="to <b>German</b>",
                cosine=-0.001,
                columns=space,
                rows=space,
            )
        ],
        merges={
            "linear": MergeError(error=0.98, residual=1.96, kept=0.5),
            "exact": MergeError(error=1e-8, residual=2e-8, kept=1.0),
        },
    )


def audit(layers: bool = True) -> AuditReport:
    places = (0, 1, 2) if layers else (None,)
    merges = [
        AuditedMerge(
            merge="linear", verdict="far", error=0.98, kept=0.5, text="far from exact, 0.98 <i>"
        ),
        AuditedMerge(merge="exact", verdict="exact", error=1e-8, kept=1.0, text="equal to it"),
        AuditedMerge(
            merge="slerp", verdict="does not apply", error=None, kept=None, text="takes two"
        ),
    ]
    composition = CompositionAudit(
        weights={"describe": 0.5, "to <b>German</b>": 0.5},
        modules=[audited_module(place, name) for place in places for name in ("up", "down")],
        merges=merges,
    )
    return AuditReport(
        machine=examples.MACHINE,
        versions=examples.VERSIONS,
        compositions={"describe in German": composition},
    )


def render(
    directory: Path,
    *,
    quality: bool,
    parity: bool,
    latency: bool,
    failing: bool,
    audited: bool = False,
) -> str:
    if audited:
        write_result(audit(), directory / AUDIT)
    if quality:
        write_result(examples.quality(), directory / QUALITY)
    if parity:
        write_result(examples.parity(failing), directory / PARITY)
    if latency:
        write_result(examples.latency(), directory / LATENCY)
    return write_report(directory).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("quality", "parity", "latency", "failing", "audited"),
    [
        (True, True, True, False, True),
        (True, False, False, False, False),
        (False, True, False, True, True),
        (False, False, True, False, False),
        (False, False, False, False, True),
    ],
)
def test_any_set_of_files_makes_a_sound_self_contained_page(
    tmp_path: Path, quality: bool, parity: bool, latency: bool, failing: bool, audited: bool
) -> None:
    text = render(
        tmp_path,
        quality=quality,
        parity=parity,
        latency=latency,
        failing=failing,
        audited=audited,
    )
    page = Page(text)
    assert page.open == []
    assert page.loads == []
    assert page.tags["script"] == page.tags["iframe"] == 0
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert max(page.ids.values()) == 1
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert page.tags["svg"] == 3 * quality + 6 * parity + 3 * latency + 3 * audited
    sections = ((AUDIT, audited), (QUALITY, quality), (PARITY, parity), (LATENCY, latency))
    for name, there in sections:
        assert (f"No <code>{name}</code>" in text) is not there
    assert not re.search(r"#0[1-4]0[0-4]0\d", text), "a plot's colour does not follow the page"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """A page with artifacts, by whether one failed; then with methods too."""
    return {
        failing: render(
            tmp_path_factory.mktemp("page"),
            quality=failing,
            parity=True,
            latency=False,
            failing=failing,
        )
        for failing in (False, True)
    }


def test_text_of_models_is_shown_and_never_run(pages: dict[bool, str]) -> None:
    text = pages[True]
    assert text.count("&lt;script&gt;alert(&#39;ß&#39;)&lt;/script&gt; &amp; $x^2$") >= 4
    assert "LC++ $5 (20 steps)" in text


def test_a_failure_is_on_top_with_its_stage(pages: dict[bool, str]) -> None:
    text = pages[True]
    verdict = text[text.index('<section class="verdict') : text.index('<section id="budget"')]
    assert "1 of 2 artifacts failed" in verdict
    assert "<b>describe in German, ONNX int4</b> lost it at <b>lowering</b>" in verdict
    assert "(and 1 more)" in verdict
    budget, artifacts = (text.index(f'<section id="{name}"') for name in ("budget", "artifacts"))
    assert text[budget:artifacts].count('<tr class="failed"') == 1
    assert text[artifacts:].count('<tr class="failed"') == 1
    assert text.count('<tr class="why">') == 1


@pytest.mark.parametrize(
    ("failing", "finding"),
    [
        (False, "Most was lost at quantized eager, ExecuTorch int4: 1.4 points of ROUGE-L (KL 0."),
        (True, "Most was lost at artifact, ONNX int4: 82.6 points of ROUGE-L (KL 2.5)."),
    ],
)
def test_the_budget_says_draws_and_lists_what_was_lost_where(
    pages: dict[bool, str], failing: bool, finding: str
) -> None:
    text = pages[failing]
    section = text[text.index('<section id="budget"') : text.index('<section id="artifacts"')]
    assert finding in section
    assert "Most was gained at calibration: 83.1 points of ROUGE-L." in section
    rows = re.findall(r"<tr.*?</tr>", section, flags=re.DOTALL)[1:]
    assert [re.findall(r'<td class="name">([a-z ]+?) ?<', row)[0] for row in rows] == [
        "exact sum",
        "merge",
        "calibration",
        *["quantized eager", "artifact"] * 2,
    ]
    lost = ["failed a gate" in row for row in rows]
    assert lost == [False] * 6 + [failing]
    assert "ExecuTorch int4: how quantized eager &lt;script&gt;" in rows[3]
    assert '<span>90.1 <span class="muted small">−1.4</span>' in rows[3]
    assert ("✕ ONNX int4 8.1</text>" in section) is failing
    assert section.count(">ExecuTorch int4 90.1</text>") == 1
    assert section.count("<li><b>") == 5, "no device, so it is not explained"


def test_a_budget_without_references_goes_by_the_loss(tmp_path: Path) -> None:
    report = examples.parity().model_copy(update={"budgets": [examples.budget(task=False)]})
    write_result(report, tmp_path / PARITY)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert (
        "Most was lost at quantized eager, ExecuTorch int4: 0.008 nats a token (KL 0.004). "
        "Most was gained at calibration: 1.188 nats a token."
    ) in text
    assert Page(text).tags["svg"] == 4, "KL by stage, position and layer, and sizes"
    shared = examples.budget().stages[2:3]
    still = examples.stage("artifact", 1e-13, 91.5, form="onnx-fp32")
    same = examples.budget().model_copy(update={"stages": (*shared, still)})
    assert lost_and_gained(same) == "No stage lost anything."


def test_only_words_that_differ_are_marked() -> None:
    assert marked("Nina y Sofia  van <hoy>.", "Nina y Anna van <hoy>. & más") == (
        "Nina y <del>Sofia</del>  van &lt;hoy&gt;.",
        "Nina y <ins>Anna</ins> van &lt;hoy&gt;. <ins>&amp; más</ins>",
    )
    assert marked("", "<b>") == ("", "<ins>&lt;b&gt;</ins>")


def test_sizes_by_part_and_what_was_left_out(tmp_path: Path) -> None:
    """A bundle's compositions have a row each and one bar together."""
    report = examples.parity()
    parts = {"linear": 2_000_000, "scales": 500_000, "compositions": 100_000, "rest": 300_000}
    found = {"bundle": True, "path": "bundles/onnx-int4", "parts": parts, "bits_per_weight": 4.63}
    both = [
        report.artifacts[1].model_copy(update={**found, "composition": name, "notes": notes})
        for name, notes in (("base alone", ("first <b> was not checked",)), ("second", ()))
    ]
    write_result(report.model_copy(update={"artifacts": both}), tmp_path / PARITY)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "first &lt;b&gt; was not checked" in text
    assert "linear 2 MB, scales 500 kB, compositions 100 kB, rest 300 kB; 4.63 bits" in text
    assert text.count(">ONNX int4 bundle</text>") == 1
    assert text.count("ONNX int4 bundle<br>") == 2


def test_audit_alone_makes_a_page(tmp_path: Path) -> None:
    write_result(audit(), tmp_path / "mine" / AUDIT)
    text = write_report(tmp_path / "mine").read_text(encoding="utf-8")
    assert "<title>mine: Nothing validated yet</title>" in text
    assert "describe in German: linear is far from the exact sum." in text
    section = text[text.index('<section id="merges"') : text.index('<section id="training"')]
    assert "0.5 × describe + 0.5 × to &lt;b&gt;German&lt;/b&gt;" in section
    assert '<td class="n bad" data-label="Relative error">0.98</td>' in section
    assert '<td class="n ok" data-label="Relative error">0</td>' in section
    assert '<td class="n muted" data-label="Relative error">–</td>' in section
    assert "far from exact, 0.98 &lt;i&gt;" in section
    assert "<code>model.layers.2.mlp.down</code>" in section
    assert "−0.00" not in section
    for label in ("no adapter at all", "column spaces", "linear", "to &lt;b&gt;German&lt;/b&gt;"):
        assert f"{label}</text>" in section
    assert "slerp</text>" not in section


def test_audit_without_layers_has_no_plots(tmp_path: Path) -> None:
    write_result(audit(layers=False), tmp_path / AUDIT)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert Page(text).tags["svg"] == 0
    assert "0.98" in text


def test_headline_says_what_is_known() -> None:
    artifacts = examples.parity().artifacts
    assert headline([]).state == "none"
    assert headline([]).text == "No artifact has been checked in this run."
    assert headline(artifacts, audit()).state == "pass"
    assert headline(artifacts).text == "4 gates passed on 2 artifacts."
    artifacts[0].gates.append(examples.gate("task", "quantization", decided=False))
    assert headline(artifacts).state == "unsure"
    assert "1 of 5 gates could not be decided" in headline(artifacts).text
    assert headline(examples.parity(failing=True).artifacts).state == "fail"


def test_nothing_to_report_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no audit\.json, quality\.json, parity\.json or lat"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (14e6, "14 MB"), (2.5e9, "2.5 GB")],
)
def test_sizes_are_for_people(count: float, text: str) -> None:
    assert size(count) == text
