"""One stage from flags alone: the same code that a recipe runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caliport.composing import compose_to
from caliport.data.examples import read_jsonl
from caliport.shipping import References, check_artifact, export_to
from caliport_core.errors import InputError
from caliport_core.progress import console, progress

_METHODS = ("linear", "exact", "lc", "lc++")


def calibrate_one(
    base: str,
    adapters: Sequence[Path],
    method: str,
    data: Path | None,
    prompt: str,
    training: Mapping[str, Any],
    out: Path,
) -> None:
    """Compose adapters by one method into ``out``."""
    from calibrate.train import TrainSettings

    if method not in _METHODS:
        raise InputError(f"--method is {method!r}, expected one of {', '.join(_METHODS)}")
    trained = method in ("lc", "lc++")
    if trained and data is None:
        raise InputError(f"--method {method} needs --data, examples of the composition")
    compose_to(
        out,
        f"{method} of {len(adapters)} adapters",
        base,
        {str(index): path for index, path in enumerate(adapters, start=1)},
        method,
        TrainSettings(**training) if trained else None,
        data,
        prompt,
        None,
    )
    console.print(f"composed adapter: {out}")


def export_one(
    base: str, adapter: Path | None, runtime: str, precision: str, context: int | None, out: Path
) -> None:
    """Export one artifact into ``out``."""
    from export.artifact import PRECISIONS, RUNTIMES

    if runtime not in RUNTIMES:
        raise InputError(f"--runtime is {runtime!r}, expected one of {', '.join(RUNTIMES)}")
    if precision not in PRECISIONS:
        raise InputError(f"--precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    export_to(out, f"{runtime} {precision}", base, adapter, runtime, precision, context)
    console.print(f"artifact: {out}")


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
    from export.artifact import eager
    from validation.evaluation import make_evaluation
    from validation.junit import write_junit
    from validation.report import write_report
    from validation.results import PARITY, ParityReport, environment, this_machine, write_result

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
