"""The plot of KL against bytes, with all rows."""

from __future__ import annotations

from pathlib import Path

from benchmarks.quantization.records import read
from benchmarks.quantization.rows import ROWS
from caliport.validation.report.plots.drawing import without_settings

_FAMILIES = {
    "caliport": ("caliport", "#1b6ca8", "o"),
    "builder": ("onnxruntime-genai builder", "#d1495b", "s"),
    "olive": ("Olive, AutoRound", "#8d5a97", "D"),
    "auto-round": ("Olive, AutoRound", "#8d5a97", "D"),
    "optimum-executorch": ("ExecuTorch's tools", "#e08e0b", "^"),
    "export-llm": ("ExecuTorch's tools", "#e08e0b", "^"),
    "llama.cpp": ("llama.cpp", "#3a7d44", "v"),
}


def draw(out: Path, picture: Path) -> bool:
    """Draw the rows of a run into a PNG; False where there is none to draw.

    The float32 row is left out: its KL is 0.
    """
    points = []
    for name, row in ROWS.items():
        record = read(out / f"{name}.json")
        if "runtime" in record and name != "fp32":
            kl, size = record["runtime"]["kl"], record["export"]["bytes"] / 1e6
            points.append((size, kl, row))
    if not points:
        return False
    with without_settings():
        import matplotlib  # noqa: F401
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(8.0, 5.0), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for family, colour, marker in dict.fromkeys(_FAMILIES.values()):
        own = [(x, y) for x, y, row in points if _FAMILIES[row.tool][0] == family]
        if own:
            sizes, losses = zip(*own, strict=True)
            axes.scatter(sizes, losses, 40, color=colour, marker=marker, label=family)
    widest = max(size for size, _, _ in points)
    for size, kl, row in points:
        last = size > 0.97 * widest  # whose name would leave the picture
        above = not any(1 < other / kl < 1.12 and 0 < x - size < 10 for x, other, _ in points)
        axes.annotate(
            row.label or row.title,
            (size, kl),
            xytext=(-6 if last else 6, 3 if above else -10),
            textcoords="offset points",
            ha="right" if last else "left",
            fontsize=8,
            color=_FAMILIES[row.tool][1],
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.12)
    axes.set_xlabel("MB of the artifact")
    axes.set_ylabel("KL from float32 in the runtime, nats a token")
    axes.grid(color="#e4e4e4", linewidth=0.8, which="both")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(picture, metadata={"Software": None})
    return True
