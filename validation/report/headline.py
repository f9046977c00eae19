"""The verdict over all artifacts in a few words, and the templates' environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from caliport.validation.records.audit import AuditReport
from caliport.validation.records.device import DeviceResult
from caliport.validation.records.reports import ArtifactResult
from caliport.validation.report.audit_summary import shown, shown_cosine
from caliport.validation.report.budget_summary import shown_form
from caliport.validation.report.names import METRIC_NAMES, runtime_label, size


@dataclass(frozen=True)
class Headline:
    """What stands on top: ``state`` is pass, unsure, fail or none."""

    state: str
    title: str
    text: str


def headline(
    artifacts: Sequence[ArtifactResult],
    audit: AuditReport | None = None,
    devices: Sequence[DeviceResult] = (),
) -> Headline:
    """The verdict over all artifacts in a few words; without any, that over the merges."""
    results: list[ArtifactResult | DeviceResult] = [*artifacts, *devices]
    if not results:
        text = " ".join(["No artifact has been checked in this run.", *_far(audit)])
        return Headline("none", "Nothing validated yet", text)
    kinds: dict[str, Sequence[ArtifactResult | DeviceResult]] = {
        "artifact": artifacts,
        "run on a device": devices,
    }
    failed = [result for result in results if not result.passed]
    checks = sum(len(result.gates) for result in results)
    if failed:
        stages = sorted({result.lost_at or "unknown" for result in failed})
        counts = [
            f"{sum(not result.passed for result in those)} of {_count(len(those), noun)}"
            for noun, those in kinds.items()
            if not all(result.passed for result in those)
        ]
        return Headline("fail", f"{' and '.join(counts)} failed", f"Lost at: {', '.join(stages)}.")
    unsure = sum(not gate.decided for result in results for gate in result.gates)
    if unsure:
        text = f"{unsure} of {_count(checks, 'gate')} could not be decided; the others passed."
        return Headline("unsure", "No gate failed", text)
    counts = [_count(len(those), noun) for noun, those in kinds.items() if those]
    text = f"{_count(checks, 'gate')} passed on {' and '.join(counts)}."
    return Headline("pass", "Accuracy survived", text)


def _far(report: AuditReport | None) -> list[str]:
    """For each composition a sentence on the merges that are far from the sum."""
    sentences = []
    for name, audit in report.compositions.items() if report else ():
        far = [merge.merge for merge in audit.merges if merge.verdict == "far"]
        sentences.append(
            f"{name}: {', '.join(far) or 'no merge'} {'are' if len(far) > 1 else 'is'} far from "
            "the exact sum."
        )
    return sentences


def page_environment() -> Environment:
    """What every page is rendered by: the package's templates and how figures are shown."""
    environment = Environment(
        loader=PackageLoader("caliport.validation.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        size=size,
        sci=_scientific,
        runtime=runtime_label,
        form=shown_form,
        metric=lambda name: METRIC_NAMES.get(name, name),
        seconds=seconds,
        error=shown,
        cosine=shown_cosine,
        svg=Markup,  # only ever given what plots.py drew
    )
    return environment


def _scientific(value: float) -> Markup:
    """A number of any magnitude: 0.0123, 3·10⁻⁷."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return Markup(f"{value:.3g}".replace("-", "−"))
    mantissa, exponent = f"{value:.1e}".split("e")
    return Markup(f"{float(mantissa):g}·10<sup>{int(exponent)}</sup>".replace("-", "−"))


def seconds(value: float) -> str:
    """A time for people: 12 ms, 3.4 s, 2.0 min."""
    if value < 1:
        return f"{value * 1000:.3g} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def _count(number: int, noun: str) -> str:
    first, _, rest = noun.partition(" ")
    return f"{number} {first}{'' if number == 1 else 's'} {rest}".rstrip()
