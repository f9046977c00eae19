"""KL, favourite tokens and perplexity of int4 on a real chat model, by quantizer and by tool.

    python -m benchmarks.real fetch
    python -m benchmarks.quantization --base MODEL --data ../shared/data --out runs/quantization

Every row is an artifact: exported by a command in a process of its own, then read back. ``weights``
are the artifact's own integers in float arithmetic, without rounded activations, over all texts;
``artifact`` are the logits that its runtime gives token by token, on a slice of the dialogues. Both
are compared with the float32 model. Calibration text is DialogSum's dev set, measured are its test
set and WikiText-2's. Finished rows are kept, so the same command resumes a killed run.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.document import markdown, put
from benchmarks.export.measuring import measured
from benchmarks.quantization.texts import articles, calibration, dialogues

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

console = Console()
_HELP = (__doc__ or "").partition("\n")[0]
CONTEXT = 1024


@dataclass(frozen=True)
class Row:
    """One artifact.

    Attributes:
        title: How the table calls it.
        flags: Of ``caliport export``; None for another tool's exporter.
        method: That exporter's algorithm.
    """

    title: str
    flags: tuple[str, ...] | None = None
    method: str = ""


_HEAD8 = ("--int8-layer", "lm_head", "--embedding-bits", "8")
ROWS = {
    "int8": Row("caliport int8", ("--precision", "int8")),
    "hqq": Row("caliport, hqq (no text)", ("--precision", "int4", "--quantizer", "hqq")),
    "weighted": Row("caliport, weighted", ("--precision", "int4", "--quantizer", "weighted")),
    "gptq": Row("**caliport, gptq**", ("--precision", "int4", "--quantizer", "gptq")),
    "hqq-head8": Row(
        "caliport, hqq, head and embedding 8 bits",
        ("--precision", "int4", "--quantizer", "hqq", *_HEAD8),
    ),
    "gptq-head8": Row(
        "**caliport, gptq**, head and embedding 8 bits",
        ("--precision", "int4", "--quantizer", "gptq", *_HEAD8),
    ),
    "builder": Row("onnxruntime-genai model builder, default"),
    "builder-rtn": Row("onnxruntime-genai model builder, rtn", method="rtn"),
    "builder-k-quant": Row("onnxruntime-genai model builder, k_quant", method="k_quant"),
}


def main(
    base: Annotated[Path, typer.Option(help="The model: a directory or a .gguf file.")],
    data: Annotated[Path, typer.Option(help="Directory with dialogsum/ and wikitext2/.")],
    out: Annotated[Path, typer.Option(help="Directory for artifacts and results.")],
    only: Annotated[list[str] | None, typer.Option(help="A row; repeatable.")] = None,
    count: Annotated[int, typer.Option(help="Dialogues and articles to measure, each.")] = 14,
    slice_: Annotated[int, typer.Option("--slice", help="Dialogues for the artifact.")] = 3,
    tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 8192,
    results: Annotated[Path, typer.Option(help="Document that gets the table.")] = Path(
        "docs/results.md"
    ),
    write: Annotated[bool, typer.Option(help="Put the table into --results.")] = True,
) -> None:
    """Export, measure and tabulate every row."""
    from caliport.core.checkpoints import load_base, load_tokenizer

    out.mkdir(parents=True, exist_ok=True)
    text = calibration(data, out / "calibration.jsonl")
    tokenizer = load_tokenizer(base)
    texts = {
        "dialogues": dialogues(data, tokenizer, count),
        "articles": articles(data, tokenizer, count),
    }
    float_model: PreTrainedModel | None = None
    for name in only or ROWS:
        record, directory = out / f"{name}.json", out / name
        key = {"base": str(base), "count": count, "slice": slice_, "tokens": tokens}
        if record.is_file() and json.loads(record.read_text(encoding="utf-8"))["key"] == key:
            continue
        command = _command(ROWS[name], base, text, tokens, directory)
        console.print(f"{name}: {' '.join(command)}")
        usage = measured(command, out / f"{name}.log")
        if float_model is None:
            float_model = load_base(base)
        found: dict[str, Any] = {
            "key": key,
            "seconds": usage.seconds,
            "peak_bytes": usage.peak_bytes,
            "bytes": sum(p.stat().st_size for p in directory.glob("model.*")),
        }
        if ROWS[name].flags is not None:
            own = partial(_logits, _own_weights(base, directory))
            found |= {label: _distance(float_model, ids, own) for label, ids in texts.items()}
        found["artifact"] = _distance(float_model, texts["dialogues"][:slice_], _stepped(directory))
        record.write_text(json.dumps(found, indent=2), encoding="utf-8")
        console.print(f"{name}: {found}")
    table = _table(out)
    console.print(Markdown(table))
    if write:
        put("quantization", table, results)


def _command(row: Row, base: Path, text: Path, tokens: int, out: Path) -> list[str]:
    if row.flags is None:
        method = ["--extra_options", f"int4_algo_config={row.method}"] if row.method else []
        return [
            *(sys.executable, "-P", "-m", "onnxruntime_genai.models.builder"),
            *("-i", str(base), "-o", str(out), "-p", "int4", "-e", "cpu"),
            *("-c", str(out.parent / "cache"), *method),
        ]
    needs = "gptq" in row.flags or "weighted" in row.flags
    return [
        *(sys.executable, "-P", "-m", "caliport", "export", "--base", str(base)),
        *("--runtime", "onnx", "--context", str(CONTEXT), "--out", str(out), *row.flags),
        *(("--calibration", str(text), "--calibration-tokens", str(tokens)) if needs else ()),
    ]


def _own_weights(base: Path, directory: Path) -> PreTrainedModel:
    """A float model with exactly the weights that an artifact holds."""
    from caliport.export.artifact import Artifact
    from caliport.export.quantization.tensors import dequantize
    from caliport.export.reference.folded import eager
    from caliport.validation.runners.weights import ArtifactIntegers

    artifact = Artifact.read(directory)
    known = ArtifactIntegers(artifact, base) if artifact.calibrated else None
    return dequantize(eager(base, None, artifact.quantization, known))


def _logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    import torch

    with torch.no_grad():
        return model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def _stepped(directory: Path) -> Any:
    """Logits of an artifact in its runtime, one token at a time."""
    import numpy as np
    import torch

    from caliport.api import load

    runner = load(directory)

    def run(ids: Sequence[int]) -> Tensor:
        runner.reset()
        rows = [runner.prefill([ids[0]]), *(runner.step(token) for token in ids[1:])]
        return torch.from_numpy(np.stack(rows))

    return run


def _distance(
    float_model: PreTrainedModel, texts: Sequence[Sequence[int]], logits: Any
) -> dict[str, float]:
    """Mean KL in nats, share of equal favourites, and perplexity over the float model's."""
    from torch.nn.functional import kl_div

    kl = same = count = lost = 0.0
    for ids in texts:
        first, second = (x.log_softmax(-1) for x in (_logits(float_model, ids), logits(ids)))
        kl += float(kl_div(second, first, log_target=True, reduction="sum"))
        same += int((first.argmax(-1) == second.argmax(-1)).sum())
        rows, following = range(len(ids) - 1), list(ids[1:])
        lost += float((first[rows, following] - second[rows, following]).sum())
        count += len(ids)
    return {
        "kl": kl / count,
        "top1": same / count,
        "perplexity": math.exp(lost / (count - len(texts))),
        "tokens": count,
    }


def _table(out: Path) -> str:
    heads = ["artifact", "KL", "top-1", "perplexity", "WikiText-2 KL", "top-1", "perplexity"]
    heads += ["in the runtime: KL", "top-1", "MB", "export s", "peak GB"]
    rows = []
    for name, row in ROWS.items():
        record = out / f"{name}.json"
        if not record.is_file():
            continue
        found = json.loads(record.read_text(encoding="utf-8"))
        cells = [row.title]
        for part in ("dialogues", "articles"):
            cells += _cells(found.get(part))
        cells += _cells(found["artifact"])[:2]
        cells += [f"{found['bytes'] / 1e6:.1f}", f"{found['seconds']:.0f}"]
        cells.append(f"{found['peak_bytes'] / 1e9:.2f}")
        rows.append(cells)
    return markdown(heads, rows)


def _cells(found: dict[str, float] | None) -> list[str]:
    if found is None:
        return ["–", "–", "–"]
    return [f"{found['kl']:.4f}", f"{found['top1']:.1%}", f"x {found['perplexity']:.3f}"]


if __name__ == "__main__":
    typer.run(main)
