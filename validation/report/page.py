"""One self-contained HTML page from whichever result files a run has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from markupsafe import Markup

from caliport.core.errors import InputError
from caliport.core.places import write_text
from caliport.validation.records.audit import AuditedModule, AuditReport
from caliport.validation.records.budget import Budget
from caliport.validation.records.device import DeviceResult
from caliport.validation.records.latency import LatencyReport
from caliport.validation.records.reports import (
    AUDIT,
    LATENCY,
    PARITY,
    QUALITY,
    REPORT,
    ArtifactResult,
    CompositionResult,
    MethodResult,
    ParityReport,
    QualityReport,
    read_if_there,
)
from caliport.validation.report.audit_summary import (
    applied,
    summaries,
    summary,
)
from caliport.validation.report.budget_summary import (
    STAGES,
    changes,
    failed_at,
    lost_and_gained,
    metric_name,
)
from caliport.validation.report.headline import headline, page_environment
from caliport.validation.report.plots import audit as audit_plots
from caliport.validation.report.plots import budget as budget_plots
from caliport.validation.report.plots import quality as plots

_MEANINGS = {
    "adapter": "the adapters are not in it as they should be",
    "lowering": "the runtime computes something else than the quantized model in PyTorch",
    "quantization": "the smaller weights cost more than may be lost",
    "calibration": "the composed adapter itself got worse",
    "device": "the device computes something else than this machine from the same file",
    "packaging": "tokenizer, template or settings are not the base's",
}
"""What it means that a gate's stage lost accuracy."""


def write_report(reports_dir: Path) -> Path:
    """Write ``report.html`` beside the JSON files of a run.

    Args:
        reports_dir: Holds any of ``audit.json``, ``quality.json``, ``parity.json`` and
            ``latency.json``. A section whose file is missing says how to get it.

    Returns:
        The page's path.

    Raises:
        InputError: None of the files is there, one is not valid, or the page cannot be written.
    """
    audit = read_if_there(AuditReport, reports_dir / AUDIT)
    quality = read_if_there(QualityReport, reports_dir / QUALITY)
    parity = read_if_there(ParityReport, reports_dir / PARITY)
    latency = read_if_there(LatencyReport, reports_dir / LATENCY)
    source = quality or parity or latency or audit
    if source is None:
        raise InputError(
            f"{reports_dir}: no {AUDIT}, {QUALITY}, {PARITY} or {LATENCY}; run a stage first"
        )
    artifacts = parity.artifacts if parity else []
    devices = parity.devices if parity else []
    results: list[ArtifactResult | DeviceResult] = [*artifacts, *devices]
    html = (
        page_environment()
        .get_template("report.html.j2")
        .render(
            name=quality.name if quality else _name(reports_dir.resolve()),
            headline=headline(artifacts, audit, devices),
            failed=[result for result in results if not result.passed],
            quality=quality,
            compositions=_compositions(quality) if quality else [],
            audits=_audits(audit) if audit else [],
            training=plots.training_curves(quality) if quality else "",
            parity=parity,
            meanings=_MEANINGS,
            budgets=[_budget(budget, parity) for budget in parity.budgets] if parity else [],
            stages=_stages(parity.budgets) if parity else {},
            examples=_examples(artifacts),
            size_plot=plots.sizes(artifacts),
            latency=latency,
            first_token_plot=plots.first_token(latency.artifacts) if latency else "",
            decode_plot=plots.decode_rate(latency.artifacts) if latency else "",
            memory_plot=plots.memory(latency.artifacts) if latency else "",
            machine=source.machine,
            versions=source.versions,
        )
    )
    path = reports_dir / REPORT
    write_text(path, html)
    return path


def _stages(budgets: Sequence[Budget]) -> dict[str, str]:
    """The stages that any budget has, each in one sentence."""
    there = {stage.stage for budget in budgets for stage in budget.stages}
    return {stage: meaning for stage, meaning in STAGES.items() if stage in there}


def _budget(budget: Budget, parity: ParityReport) -> dict[str, Any]:
    """What the template needs of one composition's budget."""
    lost = failed_at(budget, [*parity.devices, *parity.artifacts])
    metric = metric_name(budget)
    return {
        "name": budget.composition,
        "finding": lost_and_gained(budget),
        "metric": metric,
        "changes": changes(budget),
        "lost": lost,
        "plots": [
            (
                f"{metric} after each stage",
                "higher is better",
                budget_plots.task_of_stages(budget),
            ),
            (
                "The same, by artifact",
                "from the last stage that they share",
                budget_plots.task_of_forms(budget, lost),
            ),
            (
                "KL of each stage",
                "how far it moved the probabilities of the next token; 0 is not at all",
                budget_plots.kl_of_stages(budget, lost),
            ),
            (
                "KL at each token of the answer",
                "against the stage before",
                budget_plots.along_positions(budget),
            ),
        ],
        "layers": budget_plots.along_layers(budget),
    }


def _examples(artifacts: Sequence[ArtifactResult]) -> list[dict[str, Any]]:
    """Texts of each artifact with differences marked; failed ones first."""
    found = []
    for artifact in artifacts:
        samples = []
        for sample in artifact.samples:
            fp32, ours = marked(sample.fp32, sample.artifact)
            samples.append(
                {
                    "input": sample.input,
                    "reference": sample.reference,
                    "fp32": fp32,
                    "artifact": ours,
                    "differs": sample.fp32 != sample.artifact,
                }
            )
        if samples:
            found.append({"artifact": artifact, "samples": samples})
    return sorted(found, key=lambda example: bool(example["artifact"].passed))


def marked(before: str, after: str) -> tuple[Markup, Markup]:
    """Two texts, words of the first alone within ``<del>``, those of the second within ``<ins>``.

    All else is escaped. White space is not compared.
    """
    words = [re.findall(r"\s*\S+", text) for text in (before, after)]
    first, second = ([word.strip() for word in text] for text in words)
    shown = [Markup(), Markup()]
    for same, a, b, c, d in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        for index, (tag, part) in enumerate((("del", words[0][a:b]), ("ins", words[1][c:d]))):
            text = "".join(part)
            if same != "equal" and text:
                space = text[: len(text) - len(text.lstrip())]
                shown[index] += Markup("{}<{tag}>{}</{tag}>").format(space, text.strip(), tag=tag)
            else:
                shown[index] += text
    return shown[0], shown[1]


def _compositions(report: QualityReport) -> list[dict[str, Any]]:
    """What the template needs of each composition."""
    return [
        {
            "name": name,
            "result": result,
            "best": _best(result),
            "top": max((max(m.rougeL, m.chrf) for m in result.methods), default=1) or 1,
            "bars": plots.quality_bars(result),
            "judged": any(m.judge is not None for m in result.methods),
            "quantized": [(m, w, q) for m in result.methods for w, q in m.quantized.items()],
            "scatter": plots.quality_bytes(result, report.metric),
        }
        for name, result in report.compositions.items()
    ]


def _audits(report: AuditReport) -> list[dict[str, Any]]:
    """What the template needs of each composition's adapters and merges."""
    return [
        {
            "name": name,
            "audit": audit,
            "sum": " + ".join(f"{weight:.3g} × {task}" for task, weight in audit.weights.items()),
            "applied": applied(audit),
            "rows": {**summaries(audit, _component), "all modules": summary(audit, audit.modules)},
            "errors": audit_plots.merge_errors(audit),
            "overlap": audit_plots.overlap(audit),
            "norms": audit_plots.norms(audit),
        }
        for name, audit in report.compositions.items()
    ]


def _component(module: AuditedModule) -> str:
    return module.component


def _name(reports_dir: Path) -> str:
    """Of a run's ``reports`` the run's name, of any other directory its own."""
    return reports_dir.parent.name if reports_dir.name == "reports" else reports_dir.name


def _best(result: CompositionResult) -> MethodResult | None:
    return next((m for m in result.methods if m.method == result.best), None)
