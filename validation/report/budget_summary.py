"""What an error budget says: the way of each form, what changed at each stage, where most went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from caliport.validation.records.budget import Budget, BudgetStage
from caliport.validation.records.device import DeviceResult
from caliport.validation.records.reports import ArtifactResult
from caliport.validation.report.names import METRIC_NAMES, RUNTIMES

STAGES = {
    "exact sum": "the base with the weighted sum of its single-task adapters, in fp32: the start",
    "merge": "the adapters merged into one, before anything is trained",
    "calibration": "the merge with its trained correction: the composed adapter that ships",
    "quantized eager": "the same with the smaller weights that ship, still in PyTorch",
    "artifact": "the exported file, run by ExecuTorch or ONNX Runtime on this machine",
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
class Step:
    """A stage and the one before it on its way.

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


def way(budget: Budget, form: str = "") -> list[Step]:
    """The stages that all share, then those of one form."""
    stages = [stage for stage in budget.stages if stage.form in ("", form)]
    return [Step(*pair) for pair in zip(stages, [None, *stages[:-1]], strict=True)]


def steps(budget: Budget) -> list[Step]:
    """Every stage once: the shared ones, then those of each form."""
    own = [step for form in forms(budget) for step in way(budget, form) if step.stage.form]
    return [*way(budget), *own]


def shown_form(form: str) -> str:
    """A form for people: ``onnx-int4-bundle`` is ONNX int4 bundle."""
    runtime, _, rest = form.partition("-")
    return f"{RUNTIMES.get(runtime, runtime)} {rest.replace('-', ' ')}".strip()


def form_of(artifact: ArtifactResult | DeviceResult) -> str:
    """The form that an artifact has in budgets."""
    return f"{artifact.runtime}-{artifact.form.replace(' ', '-')}"


def failed_at(budget: Budget, artifacts: Sequence[ArtifactResult | DeviceResult]) -> dict[str, str]:
    """For each form that failed a gate the stage of the budget where it was lost.

    The last of several results of one form decides.
    """
    return {
        form_of(artifact): _FAILS.get(artifact.lost_at or "", "")
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
    found = [step for step in steps(budget) if step.before is not None]
    task = [step.task for step in found]
    loss = [None if step.nats is None else -step.nats for step in found]
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
