"""How every plot is drawn: inline SVG whose colours follow the page, in light and in dark."""

from __future__ import annotations

import io
import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from caliport.core.patching import exclusive, swapped_here

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib writes plain colours; each stands for a variable of the page's style sheet.
INK, MUTED, LINE, FAIL = "#010101", "#020202", "#030303", "#010104"
SERIES = [f"#0400{i:02x}" for i in range(1, 9)]
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    FAIL: "var(--fail)",
    **{colour: f"var(--s{i})" for i, colour in enumerate(SERIES, start=1)},
}
_numbers = itertools.count(1)


def legend(figure: Figure, columns: int = 2) -> None:
    """All labels below the axes, in columns."""
    figure.legend(
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        labelcolor=INK,
        fontsize=9,
        columnspacing=1.2,
        handlelength=1.6,
        handletextpad=0.5,
    )


def svg(
    draw: Callable[[Figure, Axes], None],
    height: float = 3.0,
    grid: Literal["x", "y", "both"] = "x",
    empty: bool = False,
) -> str:
    """Draw one figure and return it as an ``<svg>`` element, or nothing where there is no data."""
    if empty:
        return ""
    with without_settings():
        import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        **_defaults(matplotlib.rcParamsDefault),
        "svg.fonttype": "none",
        "svg.hashsalt": "caliport",
        "text.parse_math": False,
        "font.size": 10,
        "axes.edgecolor": LINE,
        "axes.labelcolor": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": grid == "both",
        "axes.axisbelow": True,
        "grid.color": LINE,
        "grid.linewidth": 0.8,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "text.color": INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.0, height), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis=grid)
        draw(figure, axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _adapt(out.getvalue())


@contextmanager
def without_settings() -> Iterator[None]:
    """Import matplotlib in the body: no file ``matplotlibrc`` but its own is read.

    It would read that of the current directory, which may be a stranger's, and fail where it is not
    text or wait where it is a pipe.
    """
    exists = os.path.exists

    def is_there(path: Any) -> bool:
        others = Path(str(path)).name == "matplotlibrc" and "mpl-data" not in str(path)
        return not others and exists(path)

    with exclusive(), swapped_here(os.path, "exists", is_there):
        yield


def _defaults(settings: Any) -> dict[str, Any]:
    """The settings that decide how something is drawn, as matplotlib has them at first."""
    from matplotlib.style.core import STYLE_BLACKLIST

    return {name: value for name, value in settings.items() if name not in STYLE_BLACKLIST}


def _adapt(text: str) -> str:
    """Keep the element alone, give its ids a number of their own and its colours variables."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    number = next(_numbers)
    text = re.sub(r'\bid="', f'id="p{number}-', text)
    text = re.sub(r'href="#', f'href="#p{number}-', text)
    text = text.replace("url(#", f"url(#p{number}-")
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r'<svg \1role="img"', text, count=1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text
