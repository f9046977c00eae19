"""One stage from flags alone: the same code that a recipe runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caliport.calibrating import How, Job, compose_to
from caliport.data.examples import read_jsonl
from caliport.methods import CORRECTED, MERGED, WEIGHTED, parse
from caliport.shipping import References, check_artifact, export_to
from caliport.sources import Source
from caliport.training import Training, features_to
from caliport_core.errors import InputError
from caliport_core.progress import console, progress
from export.artifact import Quantization


def calibrate_one(
    base: str,
    adapters: Sequence[Path],
    method: str,
    data: Path | None,
    prompt: str,
    training: Mapping[str, Any],
    weights: Sequence[float],
    out: Path,
) -> None:
    """Compose adapters by one method into ``out``."""
    from calibrate.train import TrainSettings

    try:
        parsed = parse(method)
    except ValueError as error:
        raise InputError(f"--method: {error}") from None
    if parsed.kind not in (*MERGED, *WEIGHTED, *CORRECTED) or parsed.shared:
        raise InputError(f"--method {method} needs a recipe; see caliport init")
    if weights and parsed.kind not in MERGED:
        raise InputError(f"--weight goes with {', '.join(MERGED)}; {method} finds its own")
    if weights and len(weights) != len(adapters):
        raise InputError(
            f"found {len(weights)} --weight for {len(adapters)} --adapter; expected one each"
        )
    if parsed.kind not in MERGED and data is None:
        raise InputError(f"--method {method} needs --data, examples of the composition")
    job = Job(
        {str(index): path for index, path in enumerate(adapters, start=1)},
        Source(data, prompt) if data is not None else None,
    )
    train = TrainSettings(**training) if parsed.kind in CORRECTED else None
    how = How(base, parsed, train, weights=tuple(weights) or None, seed=training["seed"])
    compose_to(out, f"{method} of {len(adapters)} adapters", job, how)
    console.print(f"composed adapter: {out}")


def features_one(
    base: str,
    data: Path,
    prompt: str,
    ranks: Sequence[str],
    training: Mapping[str, Any],
    earlier: Path | None,
    out: Path,
) -> None:
    """Train FLix features on examples that name theirs; ``earlier`` ones stay as they are.

    Args:
        base: Directory or hub name of the base.
        data: JSON Lines with ``features``.
        prompt: Around each input.
        ranks: ``NAME=RANK`` of each feature to train.
        training: Fields of ``TrainSettings``.
        earlier: A directory of features trained earlier.
        out: The directory to appear, with a PEFT directory a feature.
    """
    from calibrate.flix import FeatureSettings
    from calibrate.train import TrainSettings

    found = {}
    for text in ranks:
        name, _, rank = text.partition("=")
        if not name.replace("_", "").replace("-", "").isalnum() or not rank.isdecimal():
            raise InputError(f"--rank {text}: expected NAME=RANK, such as de=8")
        if int(rank) < 1:
            raise InputError(f"--rank {text}: expected a rank of at least 1")
        found[name] = int(rank)
    features_to(
        out,
        f"FLix: {', '.join(found)}",
        [Source(data, prompt)],
        FeatureSettings(found),
        Training(base, TrainSettings(**training)),
        earlier,
    )
    console.print(f"features: {out}")


def export_one(
    base: str,
    adapter: Path | None,
    runtime: str,
    how: Quantization,
    context: int | None,
    out: Path,
    *,
    preflight: bool = True,
    repo_id: str | None = None,
    private: bool = False,
) -> None:
    """Export one artifact into ``out`` and push it to ``repo_id`` where one is given."""
    from export.artifact import RUNTIMES
    from export.hub import check_repo_id, push

    if runtime not in RUNTIMES:
        raise InputError(f"--runtime is {runtime!r}, expected one of {', '.join(RUNTIMES)}")
    if repo_id is not None:
        check_repo_id(repo_id)
    title = f"{runtime} {how.precision}"
    export_to(out, title, base, adapter, runtime, how, context, preflight=preflight)
    console.print(f"artifact: {out}")
    if repo_id is not None:
        console.print(f"pushed: {push(out, repo_id, private=private)}")


def validate_one(
    artifact: Path,
    base: str,
    adapter: Path | None,
    prompts: Path | None,
    prompt: str,
    threads: int | None,
    out: Path | None,
) -> bool:
    """Validate one artifact, show its gates, and write reports where asked."""
    from caliport.tables import show_gates
    from caliport_core.checkpoints import load_tokenizer
    from caliport_core.directories import check_files
    from export.artifact import eager
    from validation.evaluation import make_evaluation
    from validation.junit import write_junit
    from validation.report import write_report
    from validation.results import PARITY, ParityReport, environment, this_machine, write_result

    check_files(artifact)  # before the references are made, which takes long
    examples = read_jsonl(prompts) if prompts is not None else None
    with progress(f"validating {artifact}", None):
        model = eager(base, adapter, "fp32")
        evaluation = make_evaluation(
            model,
            load_tokenizer(base, model),
            [prompt.replace("{input}", e.input) for e in examples] if examples else None,
            [e.output for e in examples] if examples else None,
        )
        result = check_artifact(
            artifact,
            References(evaluation, base, adapter),
            has_adapter=adapter is not None,
            composition=artifact.name,
            method="adapter" if adapter is not None else "base",
            metric="rougeL",
            threads=threads or this_machine().cores,
            limits={},
        )
    show_gates(result)
    if out is not None:
        report = ParityReport(machine=this_machine(), versions=environment(), artifacts=[result])
        write_result(report, out / PARITY)
        write_junit([result], out / "junit.xml")
        print(f"report: {write_report(out)}")
    return result.passed


def write_template(path: Path) -> None:
    """Write the commented recipe to ``path``, which must not be there yet."""
    from importlib.resources import files

    text = files("caliport").joinpath("template.yaml").read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise InputError(f"{path}: is there already; name a new file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    console.print(f"wrote {path}; next: caliport run {path}")
