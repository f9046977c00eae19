"""The exporters: the packages that each needs, and the command that a user would type."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Job:
    """One export: checkpoint, output directory and context length.

    ``work`` is a directory for intermediate files, ``python`` the exporter's interpreter.
    """

    checkpoint: Path
    artifact: Path
    work: Path
    context: int
    python: str


@dataclass(frozen=True)
class Exporter:
    """A tool that exports the checkpoint to an artifact.

    Attributes:
        title: Its name in the tables.
        runtime: ``executorch`` or ``onnx``.
        installs: Arguments of each ``pip install``, in order; empty for caliport's environment.
            The first is always torch with an exact version, so that pip resolves no other.
        shown: Packages whose versions the tables show.
        command: The command to measure.
        prepare: Preparation that is not measured.
    """

    title: str
    runtime: str
    installs: tuple[tuple[str, ...], ...]
    shown: tuple[str, ...]
    command: Callable[[Job], list[str]]
    prepare: Callable[[Job], None] = lambda _: None


def interpreter(name: str, peers: Path) -> str:
    """The Python interpreter that an exporter runs in."""
    return str(peers / name / "bin" / "python") if EXPORTERS[name].installs else sys.executable


def _caliport(runtime: str) -> Callable[[Job], list[str]]:
    def command(job: Job) -> list[str]:
        return [
            *(job.python, "-P", "-m", "caliport", "export", "--base", str(job.checkpoint)),
            *("--runtime", runtime, "--precision", "int4"),
            *("--context", str(job.context), "--out", str(job.artifact)),
        ]

    return command


def _optimum(job: Job) -> list[str]:
    return [
        str(Path(job.python).with_name("optimum-cli")),
        *("export", "executorch", "--model", str(job.checkpoint)),
        *("--task", "text-generation", "--recipe", "xnnpack"),
        *("--use_custom_sdpa", "--use_custom_kv_cache"),
        *("--qlinear", "8da4w", "--qlinear_group_size", "32", "--qembedding", "8w"),
        *("--max_seq_len", str(job.context), "--output_dir", str(job.artifact)),
    ]


def _export_llm(job: Job) -> list[str]:
    module = "executorch.extension.llm.export.export_llm"
    return [job.python, "-P", "-m", module, "--config", str(job.work / "export.yaml")]


def _meta_checkpoint(job: Job) -> None:
    """Convert the weights to Meta's format; write settings for XNNPACK with groups of 32."""
    from benchmarks.export.meta import CHECKPOINT, PARAMETERS, write_meta

    write_meta(job.checkpoint, job.work)
    config = json.loads((job.checkpoint / "config.json").read_text(encoding="utf-8"))
    ids = {"get_bos_id": config["bos_token_id"], "get_eos_ids": config["eos_token_id"]}
    settings = {
        "base": {
            "model_class": "llama3_2",
            "checkpoint": str(job.work / CHECKPOINT),
            "params": str(job.work / PARAMETERS),
            "metadata": json.dumps(ids),
        },
        "model": {
            "use_kv_cache": True,
            "use_sdpa_with_kv_cache": True,
            "dtype_override": "fp32",
            "enable_dynamic_shape": True,
        },
        "quantization": {"qmode": "8da4w", "group_size": 32, "embedding_quantize": "8,0"},
        "backend": {"xnnpack": {"enabled": True, "extended_ops": True}},
        "export": {
            "max_seq_length": job.context,
            "max_context_length": job.context,
            "output_name": str(job.artifact / "model.pte"),
        },
    }
    job.artifact.mkdir()
    # JSON is YAML too
    (job.work / "export.yaml").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _model_builder(job: Job) -> list[str]:
    return [
        *(job.python, "-P", "-m", "onnxruntime_genai.models.builder"),
        *("-m", str(job.work / "checkpoint"), "-o", str(job.artifact)),
        *("-p", "int4", "-e", "cpu", "-c", str(job.work / "cache")),
    ]


def _short_context(job: Job) -> None:
    """Link the checkpoint with a config of the requested context.

    The builder has no option for it and otherwise writes rotary tables for all of the base's
    positions.
    """
    view = job.work / "checkpoint"
    view.mkdir()
    for entry in job.checkpoint.iterdir():
        (view / entry.name).symlink_to(entry)
    config = json.loads((view / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = job.context
    (view / "config.json").unlink()
    (view / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


EXPORTERS: dict[str, Exporter] = {
    "caliport-executorch": Exporter(
        title="caliport",
        runtime="executorch",
        installs=(),
        shown=("executorch", "torch", "torchao", "transformers"),
        command=_caliport("executorch"),
    ),
    "optimum-executorch": Exporter(
        title="optimum-executorch",
        runtime="executorch",
        installs=(
            (TORCH,),
            (
                TORCH,
                "executorch==1.4.1",
                "transformers==5.0.0rc1",
                "optimum==2.0.0",
                "torchao==0.18.0",
                "accelerate==1.15.0",
            ),
            # its requirements are listed above, in versions that work together
            ("--no-deps", "optimum-executorch==1.1.0"),
        ),
        shown=("optimum-executorch", "executorch", "torch", "torchao", "transformers"),
        command=_optimum,
    ),
    "export-llm": Exporter(
        title="ExecuTorch `export_llm`",
        runtime="executorch",
        installs=((TORCH,), (TORCH, "executorch==1.5.1", "torchao==0.18.0")),
        shown=("executorch", "torch", "torchao"),
        command=_export_llm,
        prepare=_meta_checkpoint,
    ),
    "caliport-onnx": Exporter(
        title="caliport",
        runtime="onnx",
        installs=(),
        shown=("onnxruntime", "onnxruntime-genai", "torch", "transformers"),
        command=_caliport("onnx"),
    ),
    "model-builder": Exporter(
        title="onnxruntime-genai model builder",
        runtime="onnx",
        installs=(
            (TORCH,),
            (
                TORCH,
                "onnxruntime-genai==0.18.0",
                "onnxruntime==1.31.1",
                "onnx==1.23.2",
                "onnx-ir==1.1.0",
                "transformers==5.23.0",
            ),
        ),
        shown=("onnxruntime-genai", "onnxruntime", "torch", "transformers"),
        command=_model_builder,
        prepare=_short_context,
    ),
}


def fresh(directory: Path) -> Path:
    """Create an empty directory; an existing one is removed first."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory
