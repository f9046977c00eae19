"""Names and numbers as reports show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from caliport.export import runtime as runtimes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


METRIC_NAMES = {"rougeL": "ROUGE-L", "chrf": "chrF", "weighted_rouge": "weighted ROUGE"}


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def runtime_label(name: str) -> str:
    """What tables and plots call a runtime; one that is unknown here keeps its name."""
    return runtimes.labels().get(name, name)


def runtime_index(name: str) -> int:
    """A runtime's place among all, for colours and markers; 0 for one that is unknown here."""
    known = runtimes.names()
    return known.index(name) if name in known else 0


def size(count: float) -> str:
    """Bytes for people: 950 B, 23 kB, 1.4 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def plain_log(axes: Axes) -> None:
    """Numbers as text: with mathtext off the usual exponents would show their markup."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def number(value: float) -> str:
    """As people write it: 0.01, 1, 100, 10⁻⁶."""
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    exponent = f"{value:.0e}".partition("e")[2]
    return "10" + str(int(exponent)).translate(_SUPERSCRIPT)
