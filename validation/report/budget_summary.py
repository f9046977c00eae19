"""An error budget in words: the stages of each form, the change at each, the largest loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from caliport.export import runtime as runtimes
from caliport.validation.records.budget import Budget, BudgetStage
from caliport.validation.records.device import DeviceResult
from caliport.validation.records.reports import ArtifactResult
from caliport.validation.report.names import METRIC_NAMES, runtime_label

_TITLES = " or ".join(runtimes.get(name).title for name in runtimes.names())
STAGES = {
    "exact sum": "the base with the weighted sum of its single-task adapters, in fp32: the start",
    "merge": "the adapters merged into one, before anything is trained",
    "calibration": "the merge with its trained correction: the composed adapter that ships",
    "quantized eager": "the same with the smaller weights that ship, still in PyTorch",
    "artifact": f"the exported file, run by {_TITLES} on this machine",
    "device": "the same file on the phone",
}
"""Each stage in one sentence, in their order."""
_FAILS = {
    "calibration": "calibration",
    "quantization": "quantized eager",
    "lowering": "artifact",
    "adapter": "artifact",
    "device": "device",
}


@dataclass(frozen=True)
class StageChange:
    """A stage and the one before it in the order of its form.

    Attributes:
        stage: The stage.
        before: None for the first of all.
    """

    stage: BudgetStage
    before: BudgetStage | None

    @property
    def task(self) -> float | None:
        """Change of the task metric in points; None where one of the two has none."""
        if self.before is None or self.before.task is None or self.stage.task is None:
            return None
        return self.stage.task - self.before.task

    @property
    def nats(self) -> float | None:
        """Change of the loss on the target tokens, in nats a token; more is worse."""
        if self.before is None:
            return None
        return math.log(self.stage.perplexity / self.before.perplexity)


def forms(budget: Budget) -> list[str]:
    """The forms of the artifacts, in their order."""
    return list(dict.fromkeys(stage.form for stage in budget.stages if stage.form))


def stages_of(budget: Budget, form: str = "") -> list[StageChange]:
    """The stages that all forms share, then those of one form."""
    stages = [stage for stage in budget.stages if stage.form in ("", form)]
    return [StageChange(*pair) for pair in zip(stages, [None, *stages[:-1]], strict=True)]


def changes(budget: Budget) -> list[StageChange]:
    """Every stage once: the shared ones, then those of each form."""
    own = [c for form in forms(budget) for c in stages_of(budget, form) if c.stage.form]
    return [*stages_of(budget), *own]


def shown_form(form: str) -> str:
    """A form for people: ``onnx-int4-bundle`` is ONNX int4 bundle."""
    runtime, _, rest = form.partition("-")
    return f"{runtime_label(runtime)} {rest.replace('-', ' ')}".strip()


def budget_form(artifact: ArtifactResult | DeviceResult) -> str:
    """The form that an artifact has in budgets."""
    return f"{artifact.runtime}-{artifact.form.replace(' ', '-')}"


def failed_at(budget: Budget, artifacts: Sequence[ArtifactResult | DeviceResult]) -> dict[str, str]:
    """For each form that failed a gate the stage of the budget where it was lost.

    The last of several results of one form decides.
    """
    return {
        budget_form(artifact): _FAILS.get(artifact.lost_at or "", "")
        for artifact in artifacts
        if artifact.composition == budget.composition and not artifact.passed
    }


def lost_and_gained(budget: Budget) -> str:
    """One sentence on the stage that lost most, and one on the one that gained most.

    By the task metric; where no stage moved it, or one has none, by the loss on the target tokens.
    """
    lost, gained = _most(budget, -1), _most(budget, 1)
    sentences = ["No stage lost anything."]
    if lost is not None:
        stage, amount = lost
        kl = f" (KL {stage.previous.kl:.2g})" if stage.previous else ""
        sentences = [f"Most was lost at {_place(stage)}: {amount}{kl}."]
    if gained is not None:
        sentences.append(f"Most was gained at {_place(gained[0])}: {gained[1]}.")
    return " ".join(sentences)


def _most(budget: Budget, sign: int) -> tuple[BudgetStage, str] | None:
    """The stage that changed most for the better (1) or the worse (-1), and by how much."""
    found = [change for change in changes(budget) if change.before is not None]
    task = [change.task for change in found]
    loss = [None if change.nats is None else -change.nats for change in found]
    units = (task, 1, f"points of {metric_name(budget)}"), (loss, 3, "nats a token")
    for values, digits, unit in units:
        known = [sign * value for value in values if value is not None]
        most = round(max(known, default=0.0), digits)
        if len(known) == len(found) and most > 0:
            return found[known.index(max(known))].stage, f"{most:.{digits}f} {unit}"
    return None


def metric_name(budget: Budget) -> str:
    """The task metric for people."""
    return METRIC_NAMES.get(budget.metric or "", budget.metric or "task metric")


def _place(stage: BudgetStage) -> str:
    return f"{stage.stage}, {shown_form(stage.form)}" if stage.form else stage.stage
