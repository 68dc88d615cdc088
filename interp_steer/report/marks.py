"""What all pictures share: colours, sizes, marks, names of axes, legends, small print, files.

Colours and marks differ in lightness as in hue, so that they survive a grey print and colour-blind
eyes. Nothing goes through pyplot: no state is left behind, any thread may draw.
"""

import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp_steer.results.built_in import BUILT_IN
from interp_steer.util.console import safe
from interp_steer.util.files import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D

RED = "crimson"
MARKS = ("o-", "s--", "^-.", "D:")
SHADES = "cividis"
SMALL, TEXT = 8.0, 9.0  # points

Record = Mapping[Any, Any]


def save(figure: "Figure", path: str | Path) -> Path:
    """Writes a figure as .png, .svg or .pdf, whole or not at all."""
    path = Path(path)
    kind = path.suffix.lstrip(".") or "png"
    # without a date the same table gives the same file
    dated: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {}
    with whole(path) as part:
        figure.savefig(part, format=kind, dpi=150, **dated)
    return path


def number(value: Any) -> float:
    return math.nan if pd.isna(value) else float(value)


def axis_name(metric: str, record: Record | None = None) -> str:
    """A metric with its unit: as a line of a table has it, else as a built-in metric's."""
    unit = (record or {}).get("unit")
    if isinstance(unit, str):
        return f"{metric} ({unit})" if unit else metric
    return BUILT_IN[metric].axis if metric in BUILT_IN else metric


def minus(text: str) -> str:
    return text.replace("-", "−")


def literal(figure: "Figure") -> "Figure":
    """The figure, with no text of it read as a formula or holding what a file cannot."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
        text.set_text(safe(text.get_text()))
    # a notebook shows it without `%matplotlib inline`; with it, IPython's own way goes first
    vars(figure)["_repr_png_"] = partial(_png, figure)
    return figure


def _png(figure: "Figure") -> bytes:
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=110)
    return written.getvalue()


def legend(
    figure: "Figure", entries: Sequence[tuple[Any, str]], note: str = "", low: bool = False
) -> None:
    """Names marks and lines, above or below the figure."""
    if not entries and not note:
        return
    longest = max((len(name) for _, name in entries), default=1)
    fits = int(figure.get_figwidth() / (0.07 * longest + 0.45))
    columns = max(1, min(len(entries), fits))
    # matplotlib fills a legend by columns; people read it by rows
    order = [i for c in range(columns) for i in range(c, len(entries), columns)]
    figure.legend(
        [entries[i][0] for i in order], [entries[i][1] for i in order],
        loc="outside lower left" if low else "outside upper left", ncols=columns, frameon=False,
        fontsize=SMALL, title=textwrap.fill(note, int(13.5 * figure.get_figwidth())),
        title_fontsize=SMALL, alignment="left",
    )  # fmt: skip


def bare(axis: "Axes") -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=SMALL)
    axis.margins(y=0.08)


def small_print(figure: "Figure", notes: Sequence[str]) -> None:
    """Small print below a figure."""
    if notes:
        said = textwrap.fill("; ".join(notes), int(13.5 * figure.get_figwidth()))
        figure.supxlabel(said, x=0.01, ha="left", fontsize=SMALL, color="0.3")


def ring() -> "Line2D":
    """The mark of the chosen setting, for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], marker="o", ls="", ms=11, mfc="none", mec=RED, mew=2.2)


def peak(values: Iterable[float]) -> float:
    """The size at which a colour scale ends, 1 for nothing: the largest, but for one outlier.

    One size beyond three times the next would leave all others pale. It takes the last colour, and
    the scale's arrow says that there is more.
    """
    sizes = sorted(abs(v) for v in values if v == v)
    if not sizes:
        return 1.0
    alone = len(sizes) > 3 and sizes[-1] > 3 * sizes[-2] > 0
    return (sizes[-2] if alone else sizes[-1]) or 1.0


def colour_bar(
    figure: "Figure | SubFigure",
    image: "AxesImage",
    axes: Sequence["Axes"],
    inches: float,
    label: str,
) -> None:
    """The scale of an image's colours, beside axes that are so tall together."""
    bottom, top = image.get_clim()
    shown = [float(v) for axis in axes for i in axis.images for v in i.get_array().compressed()]  # type: ignore[union-attr]
    over, under = max(shown, default=top) > top, min(shown, default=bottom) < bottom
    bar = figure.colorbar(
        image, ax=list(axes), shrink=min(1.0, 2.6 / inches), anchor=(0, 1), aspect=18,
        extend="both" if over and under else "max" if over else "min" if under else "neither",
    )  # fmt: skip
    bar.set_label(label, fontsize=TEXT)
    bar.ax.tick_params(labelsize=SMALL)
