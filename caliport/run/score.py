"""Score every method of every composition on the validation split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.directories import read_manifest
from caliport.core.processes import is_main
from caliport.core.progress import progress
from caliport.core.prompts import put_in
from caliport.export.quantization.choices import Quantization
from caliport.recipe.methods import parse
from caliport.recipe.schema import prompt_of, prompts_of
from caliport.run.integers import folded_request, frozen_base, known_integers
from caliport.run.resolve import (
    FP32,
    best_method,
    chosen_on,
    expanded_methods,
    quantization_of,
    read_score,
    reported,
    variants_of,
)
from caliport.run.workspace import Workspace
from caliport.stages.stage import stage
from caliport.stages.sweep import seconds_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from caliport.data.examples import Example
    from caliport.export.quantization.tensors import KnownIntegers
    from caliport.validation.evaluation.quality import Score
    from caliport.validation.records.reports import MethodResult

_SAMPLES = 6
_BYTES_PER_VALUE = 2  # adapters are counted at 16 bit, as in the paper


def score_all(space: Workspace) -> None:
    """Score every method, each in a stage of its own, and write the quality report."""
    for composition, tasks in space.recipe.compositions.items():
        for method in expanded_methods(space, tasks):
            for variant in variants_of(space, method):
                score_method(space, composition, method, variant)
            if space.recipe.evaluation.judge is not None:
                judge_method(space, composition, method)
    if is_main():
        _write_quality(space)


def score_method(space: Workspace, composition: str, method: str, variant: str) -> None:
    """Score one method with fp32 weights, or with quantized ones such as ``int4``."""
    recipe = space.recipe
    tasks = recipe.compositions[composition]
    adapters = _adapters(space, composition, method)
    shown = f"{method} in {variant}" if variant != FP32 else method
    adapter = adapters[0] if adapters else None
    request = None
    if variant == "int4":
        request = folded_request(space, composition, method, adapter)
    frozen = frozen_base(space, variant)
    kept_back = chosen_on(space, composition)
    small = variant == FP32 and not method.startswith("lora-") and parse(method).small

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        from caliport.core.checkpoints import load_base, load_tokenizer
        from caliport.export.calibrated.integers import Integers

        examples = reported(space, composition, recipe.evaluation.examples)
        tokenizer = load_tokenizer(space.base, load_base(space.base))
        title, choice = f"{composition}: scoring {shown}", {}
        if method == "multi-step":
            score = _score_chain(space, tokenizer, tasks, examples, title)
        else:
            known: KnownIntegers | None = None
            if request is not None:
                known = known_integers(request, resume)
            elif frozen is not None:
                known = Integers(frozen)
            model = _with_adapter(space, adapter, variant, known)
            prompt = prompt_of(recipe, composition, method)
            score = _score_model(space, model, tokenizer, prompt, examples, title)
            if small and kept_back:
                choice["choice_loss"] = _loss(space, model, tokenizer, prompt, kept_back)
        result = choice | _result(score)
        (partial / "score.json").write_text(json.dumps(result, ensure_ascii=False))

    inputs: dict[str, Path | str] = {f"adapter {i}": path for i, path in enumerate(adapters)}
    inputs |= {"base": space.base, "examples": space.data / f"{composition}.validation.jsonl"}
    settings: dict[str, Any] = {
        "method": method,
        "variant": variant,
        "evaluation": recipe.evaluation.model_dump(mode="json", exclude={"quantized", "judge"}),
        "prompts": [
            prompt_of(recipe, composition, method),
            *(prompts_of(recipe)[task] for task in tasks),
        ],
    }
    if kept_back:
        settings["kept back"] = len(kept_back)
    if variant != FP32:
        settings["quantization"] = quantization_of(recipe, variant.partition("-")[0])
    if request is not None:
        settings["quantization"] = request.quantization
        inputs |= {} if request.text is None else request.text.inputs()
        settings |= {} if request.text is None else {"calibration": request.text.settings()}
    if frozen is not None:
        inputs["integers"] = frozen
    out = space.kept("scores", composition, method, variant)
    stage(out, "score", f"{composition}: score of {shown}", inputs, settings, build)


def _adapters(space: Workspace, composition: str, method: str) -> list[Path]:
    """The adapters that a method uses, one after the other."""
    if method == "multi-step":
        return [space.adapter(task) for task in space.recipe.compositions[composition]]
    if method.startswith("lora-"):
        return [space.adapter(method.removeprefix("lora-"))]
    return [space.composed(composition, method)] if parse(method).composed else []


def _result(score: Score) -> dict[str, Any]:
    rouges = score.examples["weighted_rouge"]
    return {
        "loss": score.loss,
        "rougeL": score.rougeL,
        "chrf": score.chrf,
        "weighted_rouge": sum(rouges) / len(rouges),
        "outputs": score.outputs,
        "examples": score.examples,
    }


def judge_method(space: Workspace, composition: str, method: str) -> None:
    """Let the recipe's judge rate every answer of a method with fp32 weights."""
    recipe = space.recipe
    settings = recipe.evaluation.judge
    assert settings is not None
    prompt = prompts_of(recipe)[composition]
    scored = space.kept("scores", composition, method, FP32)

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        from caliport.validation.evaluation.judge import EndpointJudge, LocalJudge, Question, count

        judge: LocalJudge | EndpointJudge
        if settings.path is not None:
            judge = LocalJudge(settings.path)
        else:
            assert settings.endpoint is not None
            assert settings.model is not None
            judge = EndpointJudge(
                settings.endpoint,
                settings.model,
                settings.key_variable,
                settings.timeout,
                settings.tries,
            )
        examples = reported(space, composition, recipe.evaluation.examples)
        outputs = read_score(space, composition, method)["outputs"]
        questions = [
            Question(prompt.replace("{input}", e.input), e.output, output)
            for e, output in zip(examples, outputs, strict=True)
        ]
        with progress(f"{composition}: judging {method}", len(questions)) as advance:
            found = count(judge(questions, advance))
        content = {"yes": found.yes, "no": found.no, "none": found.none, "share": found.share}
        (partial / "judge.json").write_text(json.dumps(content))

    inputs = {"score": scored, "examples": space.data / f"{composition}.validation.jsonl"}
    # Timeout and retries do not change the judgement.
    asked = settings.model_dump(mode="json", include={"endpoint", "model", "path"})
    out = space.kept("judged", composition, method)
    title = f"{composition}: judgement of {method}"
    stage(out, "judge", title, inputs, {"judge": asked, "prompt": prompt}, build)


def _judged(space: Workspace, composition: str, method: str) -> float | None:
    if space.recipe.evaluation.judge is None:
        return None
    path = space.kept("judged", composition, method) / "judge.json"
    return float(json.loads(path.read_text(encoding="utf-8"))["share"])


def _with_adapter(
    space: Workspace,
    adapter: Path | None,
    variant: str = FP32,
    known: KnownIntegers | None = None,
) -> PreTrainedModel:
    """The base with an adapter folded in: in fp32, quantized, or beside a quantized base."""
    from caliport.calibrate.peft_files import read_update
    from caliport.core.checkpoints import load_base
    from caliport.export.decoder.fold import fold
    from caliport.export.quantization.tensors import as_shipped, plan_of, quantize

    model = load_base(space.base)
    precision, _, bundle = variant.partition("-")
    update = None if adapter is None else read_update(adapter, model)
    how = quantization_of(space.recipe, precision) or Quantization(FP32)
    if bundle:
        model = as_shipped(model, how, known=known)
    if adapter is not None and update is not None:
        model = fold(model, update, adapter)
    if bundle:
        return model
    forms = plan_of(model, how)
    return quantize(model, how.precision, forms, known)


def _prompts(
    tokenizer: PreTrainedTokenizerBase, prompt: str, examples: Sequence[Example]
) -> list[list[int]]:
    from caliport.core.checkpoints import encode_prompt

    return [encode_prompt(tokenizer, put_in(prompt, e.input)) for e in examples]


def _loss(
    space: Workspace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    examples: Sequence[Example],
) -> float:
    from caliport.validation.evaluation.quality import reference_loss

    prompts, answers = _prompts(tokenizer, prompt, examples), [e.output for e in examples]
    size = space.recipe.evaluation.batch_size
    return reference_loss(model, tokenizer, prompts, answers, size)[0]


def _score_model(
    space: Workspace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    examples: list[Example],
    title: str,
) -> Score:
    from caliport.validation.evaluation.quality import score

    settings = space.recipe.evaluation
    prompts = _prompts(tokenizer, prompt, examples)
    references = [e.output for e in examples]
    with progress(title, len(prompts)) as advance:
        return score(
            model,
            tokenizer,
            prompts,
            references,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            progress=advance,
        )


def _score_chain(
    space: Workspace,
    tokenizer: PreTrainedTokenizerBase,
    tasks: tuple[str, ...],
    examples: list[Example],
    title: str,
) -> Score:
    """One pass per task, each with its own adapter and prompt, on the output of the pass before.

    The loss is the last pass's on the reference, given the outputs of the earlier passes.
    """
    from caliport.data.examples import Example

    for index, task in enumerate(tasks):
        model = _with_adapter(space, space.adapter(task))
        prompt = prompts_of(space.recipe)[task]
        note = f"{title} {index + 1}/{len(tasks)}"
        score = _score_model(space, model, tokenizer, prompt, examples, note)
        examples = [
            Example(text, e.output) for text, e in zip(score.outputs, examples, strict=True)
        ]
    return score


def _write_quality(space: Workspace) -> None:
    from caliport.validation.records.reports import (
        QUALITY,
        CompositionResult,
        QualityReport,
        QualitySample,
        environment,
        this_machine,
        write_result,
    )

    recipe = space.recipe
    results = {}
    for composition, tasks in recipe.compositions.items():
        methods = expanded_methods(space, tasks)
        found = {method: read_score(space, composition, method) for method in methods}
        examples = reported(space, composition, recipe.evaluation.examples)
        results[composition] = CompositionResult(
            tasks=list(tasks),
            split="validation",
            examples=len(examples),
            methods=[_method(space, composition, m, found[m]) for m in methods],
            best=best_method(space, composition),
            chosen_on=len(chosen_on(space, composition)),
            samples=[
                QualitySample(
                    input=example.input,
                    reference=example.output,
                    outputs={method: found[method]["outputs"][i] for method in methods},
                )
                for i, example in enumerate(examples[:_SAMPLES])
            ],
        )
    report = QualityReport(
        name=recipe.name,
        machine=this_machine(),
        versions=environment(),
        metric=recipe.evaluation.metric,
        compositions=results,
        training=_curves(space),
    )
    write_result(report, space.reports / QUALITY)


def _method(space: Workspace, composition: str, name: str, score: dict[str, Any]) -> MethodResult:
    from caliport.validation.records.reports import MethodResult, QuantizedScore

    method = None if name.startswith("lora-") else parse(name)
    composed = method is not None and method.composed
    manifest = read_manifest(space.composed(composition, name)) if composed else {}
    parameters = manifest.get("parameters", 0)
    quantized = {
        variant: read_score(space, composition, name, variant)
        for variant in variants_of(space, name)
        if variant != FP32
    }
    return MethodResult(
        method=name,
        label=method.label if method else f"{name.removeprefix('lora-')} LoRA alone",
        loss=score["loss"],
        rougeL=score["rougeL"],
        chrf=score["chrf"],
        weighted_rouge=score["weighted_rouge"],
        judge=_judged(space, composition, name),
        parameters=parameters,
        bytes=_BYTES_PER_VALUE * parameters,
        passes=len(space.recipe.compositions[composition]) if name == "multi-step" else 1,
        seconds=seconds_of(manifest),
        quantized={
            variant: QuantizedScore(loss=s["loss"], rougeL=s["rougeL"], chrf=s["chrf"])
            for variant, s in quantized.items()
        },
    )


def _curves(space: Workspace) -> dict[str, list[Any]]:
    """Training curves of everything that the run trained, from the manifests."""
    from caliport.validation.records.reports import Point

    places = {"base": space.root / "base"}
    places |= {f"adapter {task}": space.root / "adapters" / task for task in space.recipe.adapters}
    for composition in space.recipe.compositions:
        for method in map(parse, space.recipe.calibration.methods):
            if method.composed:
                place = space.composed(composition, method.name)
                places[f"{composition} {method.name}"] = place
    curves = {label: read_manifest(p).get("curve") for label, p in places.items() if p.exists()}
    return {label: [Point(**point) for point in curve] for label, curve in curves.items() if curve}
