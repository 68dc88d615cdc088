"""A study's grid as a heat map: its settings with their places, coloured by their effects."""

import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp_steer.report.marks import (
    RED,
    SHADES,
    SMALL,
    TEXT,
    Record,
    axis_name,
    colour_bar,
    legend,
    literal,
    minus,
    peak,
    ring,
)
from interp_steer.report.spots import Spot, largest, names, spots, strength

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


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
    all the way, so that a grey print still tells the sign. An outlier takes the last colour.

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
        cell = max(cell, 0.075 * max(map(len, self.levels)) + 0.06)
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
    top = peak(s.effect for p in panels for s in p.spots)
    axes = list(part.subplots(*shape, squeeze=False).flat)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes, panels, strict=False):
        image = _heat(axis, panel, chosen, top)
    tall = sum(panel.height for panel in panels[: shape[0]])
    label = f"effect on {axis_name(metric, panels[0].spots[0].record)}"
    colour_bar(part, image, axes[: len(panels)], tall, label)
    labels = [strength(panel.spots) for panel in panels]
    if len(set(labels)) == 1:  # said once for all panels
        part.supxlabel(textwrap.fill(labels[0], 44), fontsize=TEXT)
    else:
        for axis, label in zip(axes, labels, strict=False):
            axis.set_xlabel(textwrap.fill(label, 24), fontsize=SMALL)


def _heat(axis: "Axes", panel: _Panel, chosen: Record | None, top: float) -> Any:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.patches import Ellipse, Rectangle
    from matplotlib.patheffects import withStroke

    shades = colormaps[SHADES]
    values = np.full((len(panel.rows), len(panel.columns)), np.nan)
    halo = [withStroke(linewidth=3.2, foreground="white")]
    digits = _digits(top)
    for spot in panel.spots:
        x, y = panel.columns.index((spot.unit, spot.value)), panel.rows.index(spot.row)
        values[y, x] = spot.effect
        known = spot.effect == spot.effect
        passes = spot.record["passes"]
        ink = "black" if spot.effect > -0.05 * top else "white"
        if not passes:
            axis.add_patch(
                Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", lw=0, ec=ink,
                          alpha=0.55, label="beyond a limit")
            )  # fmt: skip
        if panel.numbered:
            back = {"fc": shades(0.5 + 0.5 * spot.effect / top), "ec": "none", "pad": 0.6}
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
        np.ma.masked_invalid(values), cmap=shades, vmin=-top, vmax=top, aspect="auto",
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
    from matplotlib.patches import Patch

    outline = Patch(fc="none", ec="black", lw=1.5)
    hatch = Patch(fc="none", ec="grey", hatch="////", lw=0)
    marks = [
        (ring(), "chosen", any(s.is_at(chosen) for s in cells)),
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
