"""The rows: an artifact each, what makes it and how."""

from __future__ import annotations

from dataclasses import dataclass

CONTEXT = 1024
"""Cache length of the artifacts, in tokens, where the tool can be told."""


@dataclass(frozen=True)
class Row:
    """One artifact.

    Attributes:
        title: How the tables call it.
        tool: ``caliport``, or one of ``peers.TOOLS``.
        options: Of ``caliport export``, or of the other tool's command.
        runtime: ``onnx``, ``executorch`` or ``llama.cpp``: what runs it.
        text: Whether it is calibrated on text.
        label: How the plot calls it; default ``title``.
    """

    title: str
    tool: str = "caliport"
    options: tuple[str, ...] = ()
    runtime: str = "onnx"
    text: bool = False
    label: str = ""


def _int4(title: str, quantizer: str, *flags: str, runtime: str = "onnx", label: str = "") -> Row:
    """A row of ours; any flags of ``caliport export`` may follow the quantizer."""
    options = ("--precision", "int4", "--quantizer", quantizer, *flags)
    return Row(title, "caliport", options, runtime, quantizer != "hqq", label)


_HEAD8 = ("--int8-layer", "lm_head", "--embedding-bits", "8")
_ROWS8 = ("--embedding-bits", "8")
_BUILDER = "onnxruntime-genai builder"

ROWS = {
    "fp32": Row("caliport fp32", options=("--precision", "fp32")),
    "int8": Row("caliport int8", options=("--precision", "int8"), label="int8"),
    "hqq": _int4("caliport, hqq (no text)", "hqq", label="hqq"),
    "weighted": _int4("caliport, weighted", "weighted", label="weighted"),
    "gptq": _int4("**caliport, gptq**", "gptq", label="gptq"),
    "gptq-norms": _int4(
        "**caliport, gptq**, norms tuned", "gptq", "--tune-norms", label="gptq, norms"
    ),
    "gptq-kl": _int4(
        "**caliport, gptq**, `--target-kl 0.06`",
        "gptq",
        *("--target-kl", "0.06"),
        label="gptq, KL 0.06",
    ),
    "hqq-head8": _int4("caliport, hqq, head and embedding 8 bits", "hqq", *_HEAD8, label="hqq 8/8"),
    "weighted-head8": _int4(
        "caliport, weighted, head and embedding 8 bits", "weighted", *_HEAD8, label="weighted 8/8"
    ),
    "gptq-head8": _int4(
        "**caliport, gptq**, head and embedding 8 bits", "gptq", *_HEAD8, label="gptq 8/8"
    ),
    "gptq-embedding8": _int4(
        "**caliport, gptq**, embedding 8 bits", "gptq", *_ROWS8, label="gptq 4/8"
    ),
    "builder": Row(f"{_BUILDER}, default", "builder", label="builder default"),
    "builder-rtn": Row(f"{_BUILDER}, rtn", "builder", ("algo_config=rtn",), label="builder rtn"),
    "builder-k-quant": Row(
        f"{_BUILDER}, k_quant", "builder", ("algo_config=k_quant",), label="builder k_quant"
    ),
    "builder-k-quant-mixed": Row(
        f"{_BUILDER}, k_quant, head and half the layers 8 bits",
        "builder",
        ("algo_config=k_quant", "matmul_mixed_precision=last_matmul:int8,mixed_layers:int8"),
        label="builder k_quant mixed",
    ),
    "olive-gptq": Row(
        "Olive GPTQ, then the builder", "olive", ("gptq",), text=True, label="Olive GPTQ"
    ),
    "auto-round": Row("AutoRound, then the builder", "auto-round", text=True, label="AutoRound"),
    "pte-hqq": _int4(
        "caliport, hqq (no text), `.pte`", "hqq", runtime="executorch", label="hqq .pte"
    ),
    "pte-gptq": _int4(
        "**caliport, gptq**, `.pte`", "gptq", runtime="executorch", label="gptq .pte"
    ),
    "optimum-executorch": Row(
        "optimum-executorch, 8da4w", "optimum-executorch", runtime="executorch", label="optimum"
    ),
    "export-llm": Row(
        "ExecuTorch `export_llm`, 8da4w", "export-llm", runtime="executorch", label="export_llm"
    ),
    "q4_0": Row("llama.cpp Q4_0", "llama.cpp", ("Q4_0",), "llama.cpp", label="Q4_0"),
    "q4_k_m": Row("llama.cpp Q4_K_M", "llama.cpp", ("Q4_K_M",), "llama.cpp", label="Q4_K_M"),
}
"""Another row of ours is a line: ``"NAME": _int4("TITLE", "gptq", "--FLAG", "VALUE")``."""

BASELINES = {"onnx": "hqq", "executorch": "pte-hqq", "llama.cpp": "hqq"}
"""By runtime, the row whose rate the others' are compared with."""
