"""``caliport.validate``: is what an artifact computes still what was trained?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.errors import InputError
from caliport.core.prompts import prompted, recorded_prompt
from caliport.export.artifact import BASE_ALONE, Artifact
from caliport.export.request import Bundle
from caliport.validation.references import FP32, EagerReferences
from caliport.validation.runners.engine import PLAIN

if TYPE_CHECKING:
    from caliport.validation.records.latency import LatencyReport
    from caliport.validation.records.reports import ArtifactResult, ParityReport

Directory = str | Path
Prompt = str | tuple[str, str]
"""An input, or an input and the right answer."""


@dataclass(frozen=True)
class Options:
    """How to validate an artifact.

    Attributes:
        threads: Threads of the runtime; None for the cores that this process may use.
        runner: What runs the artifact: a word of ``caliport.validation.runners.open.open_runner``.
        precision: ``fp32``, ``int8`` or ``int4``, which decides the limits; only for an artifact of
            another tool, which has no manifest that says it.
        against: Another artifact to use as the reference in place of fp32 PyTorch; then lowering
            and quantization are judged together, as for an artifact of another tool.
        against_runner: What runs ``against``.
        by_layer: Measure in the error budget how far residual streams are too.
        prompt: The template around each prompt, with ``{input}``; None for the one that the
            artifact records, or else its adapter; ``{input}`` for none.
    """

    threads: int | None = None
    runner: str = PLAIN
    precision: str | None = None
    against: Artifact | None = None
    against_runner: str = PLAIN
    by_layer: bool = False
    prompt: str | None = None


@dataclass(frozen=True)
class Validation:
    """One artifact to validate, from what it was made and how.

    Attributes:
        artifact: What to validate.
        base: A Hugging Face directory or hub name.
        adapter: The PEFT LoRA directory that was folded in; None for the base alone.
        bundle: Of a bundle, the compositions to validate and the shared adapters that it stores.
        prompts: What to ask, all with the right answer or none; None for a built-in set.
        options: How to validate.
        places: Where each prompt stands, for messages; empty: they are numbered.
    """

    artifact: Artifact
    base: Directory
    adapter: Path | None = None
    bundle: Bundle = field(default_factory=lambda: Bundle({}))
    prompts: Sequence[Prompt] | None = None
    options: Options = field(default_factory=Options)
    places: Sequence[str] = ()


@dataclass(frozen=True)
class Composition:
    """An artifact, or one composition of a bundle, and the adapter that it should contain.

    Attributes:
        label: Its name in reports.
        name: Of a bundle, the composition; None for its base alone, or for a fold.
        adapter: A PEFT LoRA directory; None for a base.
    """

    label: str
    name: str | None
    adapter: Path | None


def validate(
    artifact: Artifact | Directory,
    base: Directory,
    adapter: Directory | None = None,
    *,
    bundle: Bundle | Mapping[str, Directory] | None = None,
    prompts: Sequence[Prompt] | None = None,
    out: Directory | None = None,
    options: Options | None = None,
) -> ParityReport:
    """Compare an artifact with eager PyTorch and judge whether accuracy survived.

    Args:
        artifact: An artifact of ours, or another tool's directory with a ``.pte`` or for
            onnxruntime-genai.
        base: A Hugging Face directory or hub name.
        adapter: The PEFT LoRA directory that was folded in; None for the base alone.
        bundle: Of a bundle, the PEFT LoRA directories of its compositions by name, or a ``Bundle``
            that names shared adapters too.
        prompts: What to ask: inputs, or pairs of an input and the right answer; None for a
            built-in set. Only right answers make the task metric possible. Each is put into the
            prompt that the artifact records, unless it is in it already; see ``Options.prompt``.
        out: Where to write ``parity.json``, ``junit.xml`` and ``report.html``; None for nowhere.
        options: How to validate.

    Returns:
        The verdict and gates of the artifact, or of a bundle's base and each composition.

    Raises:
        InputError: No artifact, changed files, or something that does not fit what it is. What can
            be judged and is wrong fails a gate instead.

    Example:
        ::

            import caliport

            report = caliport.validate("artifacts/sum", "models/my-base", "adapters/sum")
            assert report.passed
    """
    from caliport.validation.records.reports import check_reports

    if out is not None:
        check_reports(Path(out))
    artifact = artifact if isinstance(artifact, Artifact) else Artifact.read(artifact)
    if not isinstance(bundle, Bundle):
        bundle = Bundle({name: Path(path) for name, path in (bundle or {}).items()})
    folded = None if adapter is None else Path(adapter)
    asked = Validation(artifact, base, folded, bundle, prompts, options or Options())
    report, _ = run(asked)
    if out is not None:
        write_reports(report, Path(out))
    return report


def run(
    asked: Validation, show: Callable[[str], AbstractContextManager[Any]] | None = None
) -> tuple[ParityReport, list[int]]:
    """Validate every composition of an artifact.

    Args:
        asked: What to validate.
        show: Given the label of a composition, a context that shows progress on it.

    Returns:
        The report, and the longest prompt's token ids.

    Raises:
        InputError: See ``validate``.
    """
    from caliport.validation.records.reports import ParityReport, environment, this_machine

    check(asked)
    budgets, longest = [], list[int]()
    results: list[ArtifactResult] = []
    for composition in compositions_to_check(asked):
        with nullcontext() if show is None else show(composition.label):
            references = make_references(asked, composition.adapter, composition.name)
            result, budget = _check(asked, composition, references)
        results.append(result)
        budgets += budget
        longest = max([longest, *references.evaluation.prompts], key=len)
    return ParityReport(
        machine=this_machine(), versions=environment(), artifacts=results, budgets=budgets
    ), longest


def check(asked: Validation) -> None:
    """Check files and options, before references are made, which takes long.

    Raises:
        InputError: The first that is wrong.
    """
    from caliport.core.model_files.base_model import check_base
    from caliport.validation.runners import engine as engines
    from caliport.validation.runners.open import check_choice

    stated_precision(asked.artifact, asked.options.precision)
    check_choice(asked.artifact, asked.options.runner)
    if asked.options.against is not None:
        check_choice(asked.options.against, asked.options.against_runner)
    compositions_to_check(asked)
    check_base(asked.base)
    for artifact in (asked.artifact, asked.options.against):
        if artifact is not None:
            engines.get(artifact.runtime).try_program(artifact)


def stated_precision(artifact: Artifact, precision: str | None) -> str:
    """An artifact's precision: its manifest's, or the stated one of another tool's artifact.

    Raises:
        InputError: Both or neither is there, or files that are not those that the manifest records.
    """
    if not artifact.is_ours:
        if precision is None:
            raise InputError(
                f"{artifact.directory}: has no manifest; expected --precision to say what it is"
            )
        return precision
    artifact.check()
    if precision is not None:
        raise InputError(
            f"--precision {precision}: {artifact.directory} has a manifest that says it"
        )
    return artifact.precision


def compositions_to_check(asked: Validation) -> list[Composition]:
    """The artifact, or of a bundle its base and the compositions that were named.

    Raises:
        InputError: Adapters that do not fit what the artifact is.
    """
    artifact, named, shared = asked.artifact, asked.bundle.compositions, asked.bundle.shared
    place = artifact.directory
    if not artifact.is_bundle:
        if named or shared:
            raise InputError(f"{place}: is no bundle; expected --adapter DIR")
        return [Composition(place.name, None, asked.adapter)]
    known = artifact.compositions
    listed = ", ".join(known) or "none"
    if asked.adapter is not None:
        raise InputError(f"{place}: is a bundle of {listed}; expected --bundle NAME=DIR")
    for name in named:
        if name not in known:
            raise InputError(f"--bundle {name}: {place} has no such composition, only {listed}")
        missing = [task for task in known[name].get("stands_on", ()) if task not in shared]
        if missing:
            raise InputError(f"--share {missing[0]}=DIR is missing; {name} stands on that adapter")
    return [
        Composition(BASE_ALONE, None, None),
        *(Composition(name, name, path) for name, path in named.items()),
    ]


def make_references(
    asked: Validation, adapter: Path | None, name: str | None = None
) -> EagerReferences:
    """Eager references of a composition on the prompts that were asked for.

    Args:
        asked: What to validate.
        adapter: The composition's PEFT LoRA directory; None for a base.
        name: Of a bundle, the composition; None for its base alone, or for a fold.

    Raises:
        InputError: Files that cannot be read, or prompts that do not fit the context.
    """
    from caliport.core.checkpoints import load_tokenizer
    from caliport.export.reference.folded import eager
    from caliport.validation.evaluation.evaluation import make_evaluation

    model = eager(asked.base, adapter, FP32)
    inputs, answers = _split(asked.prompts)
    if inputs is not None:
        inputs = _asked(asked, inputs, adapter, name)
    tokenizer = load_tokenizer(asked.base, model)
    evaluation = make_evaluation(model, tokenizer, inputs, answers, places=asked.places)
    shared, by_layer = asked.bundle.shared, asked.options.by_layer
    return EagerReferences(evaluation, asked.base, adapter, shared, by_layer)


def _asked(
    asked: Validation, inputs: Sequence[str], adapter: Path | None, name: str | None
) -> list[str]:
    """Inputs in the template that was given, or in the one that artifact or adapter record."""
    recorded = asked.artifact.prompt(name)
    if recorded is None and adapter is not None:
        recorded = recorded_prompt(adapter)
    return prompted(inputs, asked.options.prompt, recorded)


def write_reports(report: ParityReport, out: Path, times: LatencyReport | None = None) -> Path:
    """Write ``parity.json``, ``junit.xml``, ``latency.json`` of ``times``, and ``report.html``.

    Returns:
        The page's path.

    Raises:
        InputError: A file cannot be written.
    """
    from caliport.validation.records.reports import JUNIT, LATENCY, PARITY, write_result
    from caliport.validation.report.junit import write_junit
    from caliport.validation.report.page import write_report

    write_result(report, out / PARITY)
    write_junit([*report.artifacts, *report.devices], out / JUNIT)
    if times is not None:
        write_result(times, out / LATENCY)
    return write_report(out)


def _check(
    asked: Validation, composition: Composition, references: EagerReferences
) -> tuple[ArtifactResult, list[Any]]:
    """The result of one composition, and its error budget, if there is one."""
    from caliport.validation.check import budget_of, check_artifact
    from caliport.validation.gates.criteria import METRIC, Caption
    from caliport.validation.other_tools import check_against
    from caliport.validation.records.reports import this_machine
    from caliport.validation.runners.open import Execution

    options, name, adapter = asked.options, composition.name, composition.adapter
    threads = options.threads or this_machine().cores
    execution = Execution(asked.artifact, threads, name, options.runner)
    if options.against is not None or not asked.artifact.is_ours:
        against, caption = None, Caption(composition.label)
        if options.against is not None:
            other = name if options.against.is_bundle else None
            against = Execution(options.against, threads, other, options.against_runner)
        precision = options.precision or asked.artifact.precision
        return check_against(execution, references, precision, against, caption), []
    caption = Caption(
        composition.label,
        "base" if adapter is None else "adapter",
        tuple(_notes(asked)) if composition.label == BASE_ALONE else (),
    )
    result, stages = check_artifact(execution, references, caption, metric=METRIC, limits={})
    if adapter is None:
        return result, []
    return result, [budget_of(composition.label, references, adapter.name, stages)]


def _notes(asked: Validation) -> Iterator[str]:
    left = [name for name in asked.artifact.compositions if name not in asked.bundle.compositions]
    if left:
        yield f"not checked, for want of --bundle NAME=DIR: {', '.join(left)}"


def _split(prompts: Sequence[Prompt] | None) -> tuple[list[str] | None, list[str] | None]:
    """Inputs, and the right answers where there are any.

    Raises:
        InputError: Some prompts have an answer and some have not.
    """
    if prompts is None:
        return None, None
    pairs = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if not pairs:
        return [prompt for prompt in prompts if isinstance(prompt, str)], None
    if len(pairs) < len(prompts):
        raise InputError(
            f"prompts: found {len(pairs)} of {len(prompts)} with an answer, expected all or none"
        )
    return [text for text, _ in pairs], [answer for _, answer in pairs]
