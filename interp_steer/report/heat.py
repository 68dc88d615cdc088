"""A study's grid as a heat map: its cells with their places, coloured by their effects.

Colours differ in lightness as in hue, so that they survive a grey print and colour-blind eyes.
Nothing goes through pyplot: no state is left behind, any thread may draw.
"""

import itertools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp_steer.errors import RequestError
from interp_steer.results.built_in import BUILT_IN
from interp_steer.results.roles import SETTING
from interp_steer.util.console import safe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

RED = "crimson"
UNITS: dict[str | None, str] = {
    "": "coefficient (residual units)",
    "dose": "dose (coefficient / median residual norm)",
    "max": "coefficient (shares of the feature's largest activation)",
    "raw": "coefficient (multiples of the direction's own length)",
    "deg": "angle (degrees)",
}
LATENT = "coefficient (activation of the feature)"
SMALL, TEXT = 8.0, 9.0  # points

Record = Mapping[Any, Any]


# --- a study's grid -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spot:
    """A line of a grid with its place: which panel, which row of it (a site), how strong."""

    record: Record
    group: tuple[str, str, str, str]  # direction, operator, scope, component
    row: str
    order: tuple[float, ...]
    unit: str | None
    value: float

    @classmethod
    def of(cls, record: Record) -> "Spot":
        name, operator, site, level, scope = (str(record[key]) for key in SETTING)
        if not operator:  # a whole line of interventions is a cell of its own
            group = ("", "", "", "")
            return cls(record, group, textwrap.shorten(name, 60), (-record["cell"],), None, 0.0)
        one = re.fullmatch(r"(\w+) ([\dh,-]+)", site)
        component, where = one.groups() if one else ("", site)
        order = tuple(float(n) for n in re.findall(r"\d+", where))
        strength, _, unit = level.partition(" ")
        group = (name, operator, scope, component)
        try:
            return cls(record, group, where, order, unit, float(strength))
        except ValueError:  # an operator without a coefficient
            return cls(record, group, where, order, None, 0.0)

    @property
    def effect(self) -> float:
        return number(self.record["effect"])

    def is_at(self, chosen: Record | None) -> bool:
        return chosen is not None and all(str(self.record[k]) == str(chosen[k]) for k in SETTING)


def spots(grid: pd.DataFrame, metrics: Sequence[str] = ()) -> list[Spot]:
    """The lines of a grid by metric, default all.

    Raises:
        RequestError: the grid has no such metric, or is empty.
    """
    if grid.empty:
        raise RequestError("the grid is empty")
    there = [str(name) for name in grid["metric"].unique()]
    if missing := [name for name in metrics if name not in there]:
        raise RequestError(f"the grid has no {missing[0]}; it has {', '.join(there)}")
    records = grid.to_dict("records")
    return [Spot.of(r) for name in metrics or there for r in records if r["metric"] == name]


def largest(cells: Sequence[Spot], chosen: Record | None, most: int) -> list[tuple[str, ...]]:
    """The groups with the largest effects on the first metric, the chosen cell's before others."""
    rank: dict[tuple[str, ...], tuple[bool, float]] = {}
    for s in cells:
        ringed, tall = rank.setdefault(s.group, (False, 0.0))
        if s.record["metric"] == cells[0].record["metric"]:
            rank[s.group] = ringed or s.is_at(chosen), max(tall, abs(s.effect))  # NaN is never more
    kept = sorted(rank, key=rank.__getitem__, reverse=True)[:most]
    return [group for group in rank if group in kept]


def names(groups: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Groups by what tells them apart; one alone by all that it is."""
    if len(groups) == 1:
        name, operator, scope, _ = groups[0]
        on = f" on {scope}" if scope not in ("", "all") else ""
        return {groups[0]: f"{operator}({name}){on}" if operator else "interventions"}
    apart = [i for i in range(4) if len({g[i] for g in groups}) > 1]
    return {g: ", ".join(g[i] for i in apart if g[i]) or "interventions" for g in groups}


def strength(cells: Sequence[Spot]) -> str:
    """What the axis of coefficients is called; nothing where there are none."""
    units = {s.unit for s in cells}
    if units == {""} and all(s.group[1] == "latent_clamp" for s in cells):
        return LATENT
    if len(units) > 1:
        return "coefficient"
    return UNITS.get(units.pop() if units else None, "")


# --- the heat map ---------------------------------------------------------------------------------


def heat_map(
    grid: pd.DataFrame,
    metrics: Sequence[str] = (),
    chosen: Record | None = None,
    most: int = 6,
) -> "Figure":
    """Effects over layer x coefficient: a part of the figure for each metric, in it a panel for
    each direction, operator, scope and component.

    Outlined cells are not excluded from being the best, hatched ones are beyond a limit, the chosen
    one is ringed. The colour is grey at no effect, blue below and yellow above, and grows lighter
    all the way, so that a grey print still tells the sign.

    Args:
        grid: `Findings.grid`.
        metrics: which, default all.
        chosen: the setting of the chosen cell.
        most: panels a metric; those with the largest effects are kept, and the figure says so.

    Raises:
        RequestError: the grid has no such metric, or is empty.
    """
    from matplotlib.figure import Figure

    if len(grid) and grid["best"].all():  # with few prompts no cell is excluded: nothing to mark
        grid = grid.assign(best=False)
    every = spots(grid, metrics)
    kept = largest(every, chosen, most)
    count = len({s.group for s in every})
    note = f"{len(kept)} of {count} panels, those with the largest effects"
    cells: dict[str, dict[tuple[str, ...], list[Spot]]] = {}
    for spot in every:
        if spot.group in kept:
            mine = cells.setdefault(str(spot.record["metric"]), {})
            mine.setdefault(spot.group, []).append(spot)
    name = names(kept)
    parts = {m: [_Panel(name[g], some[g]) for g in kept if g in some] for m, some in cells.items()}
    panels = list(itertools.chain(*parts.values()))
    wide = max(panel.width for panel in panels)
    across = max(1, min(len(kept), int(6.6 / wide)))
    down = math.ceil(len(kept) / across)
    beside = 1 if len(kept) > 1 else min(len(parts), 3)  # metrics next to each other
    below = math.ceil(len(parts) / beside)
    size = (
        max(3.5, beside * (across * wide + 0.9)),
        below * down * (max(panel.height for panel in panels) + 0.2) + 0.9,
    )
    figure = Figure(figsize=size, layout="constrained")
    rooms = figure.subfigures(below, beside, squeeze=False).flat
    for room, (metric, some) in zip(rooms, parts.items(), strict=False):
        _heat_of_metric(room, metric, some, chosen, (down, across))
    marks = _marks([spot for panel in panels for spot in panel.spots], chosen)
    legend(figure, marks, note if len(kept) < count else "", low=True)
    return literal(figure)


@dataclass(frozen=True)
class _Panel:
    """The cells of one panel of a heat map."""

    name: str
    spots: Sequence[Spot]

    @cached_property
    def rows(self) -> list[str]:
        return [row for _, row in sorted({(s.order, s.row) for s in self.spots})]

    @cached_property
    def columns(self) -> list[tuple[str | None, float]]:
        columns = {(s.unit, s.value) for s in self.spots}
        return sorted(columns, key=lambda c: (c[0] or "", c[1], c[0] is None))

    @property
    def numbered(self) -> bool:
        """Whether there is room for numbers in the cells."""
        return len(self.rows) <= 40 and len(self.columns) <= 12

    @property
    def width(self) -> float:
        """Inches."""
        cell = 0.43 if self.numbered else 0.2
        return max(1.4, cell * len(self.columns)) + 0.065 * max(map(len, self.rows)) + 0.3

    @property
    def height(self) -> float:
        """Inches."""
        return max(0.7, (0.23 if self.numbered else 0.11) * len(self.rows)) + 0.75

    @property
    def levels(self) -> list[str]:
        """What its columns are called."""
        mixed = len({unit for unit, _ in self.columns}) > 1
        return [
            self.spots[0].group[1]
            if unit is None
            else minus(f"{value:g} {unit}".strip() if mixed else f"{value:g}")
            for unit, value in self.columns
        ]


def _heat_of_metric(
    part: "SubFigure",
    metric: str,
    panels: Sequence[_Panel],
    chosen: Record | None,
    shape: tuple[int, int],
) -> None:
    peak = max([0.0, *(abs(s.effect) for p in panels for s in p.spots)]) or 1.0
    axes = list(part.subplots(*shape, squeeze=False).flat)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes, panels, strict=False):
        image = _heat(axis, panel, chosen, peak)
    tall = sum(panel.height for panel in panels[: shape[0]])
    bar = part.colorbar(
        image, ax=axes[: len(panels)], shrink=min(1.0, 2.6 / tall), anchor=(0, 1), aspect=18
    )
    bar.set_label(f"effect on {axis_name(metric, panels[0].spots[0].record)}", fontsize=TEXT)
    bar.ax.tick_params(labelsize=SMALL)
    labels = [strength(panel.spots) for panel in panels]
    if len(set(labels)) == 1:  # said once for all panels
        part.supxlabel(textwrap.fill(labels[0], 44), fontsize=TEXT)
    else:
        for axis, label in zip(axes, labels, strict=False):
            axis.set_xlabel(textwrap.fill(label, 24), fontsize=SMALL)


def _heat(axis: "Axes", panel: _Panel, chosen: Record | None, peak: float) -> Any:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.patches import Ellipse, Rectangle
    from matplotlib.patheffects import withStroke

    shades = colormaps["cividis"]
    values = np.full((len(panel.rows), len(panel.columns)), np.nan)
    halo = [withStroke(linewidth=3.2, foreground="white")]
    digits = _digits(peak)
    for spot in panel.spots:
        x, y = panel.columns.index((spot.unit, spot.value)), panel.rows.index(spot.row)
        values[y, x] = spot.effect
        known = spot.effect == spot.effect
        passes = spot.record["passes"]
        ink = "black" if spot.effect > -0.05 * peak else "white"
        if not passes:
            axis.add_patch(
                Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", lw=0, ec=ink,
                          alpha=0.55, label="beyond a limit")
            )  # fmt: skip
        if panel.numbered:
            back = {"fc": shades(0.5 + 0.5 * spot.effect / peak), "ec": "none", "pad": 0.6}
            axis.text(
                x, y, _signed(spot.effect, digits) if known else "none", ha="center", va="center",
                fontsize=7.5, color=ink if known else "black",
                bbox=back if known and not passes else None,
            )  # fmt: skip
        if spot.record["best"]:
            axis.add_patch(
                Rectangle((x - 0.44, y - 0.42), 0.88, 0.84, fill=False, ec="black", lw=1.5,
                          path_effects=halo, label="not excluded from being best")
            )  # fmt: skip
        if spot.is_at(chosen):
            # in flat cells a ring reaches beyond them
            size = 0.98 if panel.numbered else max(1.0, 0.14 * len(panel.rows) / panel.height)
            axis.add_patch(
                Ellipse((x, y), 0.98, size, fill=False, ec=RED, lw=2.2, path_effects=halo,
                        label="chosen", zorder=5, clip_on=False)
            )  # fmt: skip
    image = axis.imshow(
        np.ma.masked_invalid(values), cmap=shades, vmin=-peak, vmax=peak, aspect="auto",
        origin="lower",
    )  # fmt: skip
    axis.set_xticks(range(len(panel.columns)), panel.levels)
    step = 1 if panel.numbered else math.ceil(len(panel.rows) / 20)
    axis.set_yticks(range(0, len(panel.rows), step), panel.rows[::step])
    axis.tick_params(labelsize=SMALL, length=2)
    if component := panel.spots[0].group[3]:
        axis.set_ylabel(f"layer ({component})", fontsize=TEXT)
    axis.set_title(textwrap.fill(panel.name, 30), fontsize=TEXT)
    return image


def _marks(cells: Sequence[Spot], chosen: Record | None) -> list[tuple[Any, str]]:
    """Legend entries for the marks that occur."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    ring = Line2D([], [], marker="o", ls="", ms=11, mfc="none", mec=RED, mew=2.2)
    outline = Patch(fc="none", ec="black", lw=1.5)
    hatch = Patch(fc="none", ec="grey", hatch="////", lw=0)
    marks = [
        (ring, "chosen", any(s.is_at(chosen) for s in cells)),
        (outline, "not excluded from being best", any(s.record["best"] for s in cells)),
        (hatch, "beyond a limit", not all(s.record["passes"] for s in cells)),
    ]
    return [(handle, name) for handle, name, occurs in marks if occurs]


def _digits(peak: float) -> int:
    """Decimals that show two places of the largest number."""
    size = math.floor(math.log10(peak))
    return min(4, max(0, 1 - size if size < 0 else 2 - size))


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return minus(text if float(text) else "0")


# --- shared with other pictures -------------------------------------------------------------------


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
    return figure


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
