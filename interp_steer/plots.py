"""Pictures of tables, each a function from a table to a matplotlib figure.

Colours differ in lightness as in hue, and lines in their marks, so that all survives a grey print
and colour-blind eyes. Nothing goes through pyplot: no state is left behind, any thread may draw.
"""

import itertools
import math
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp_steer.console import safe
from interp_steer.errors import RequestError
from interp_steer.files import whole
from interp_steer.metrics import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

SETTING = ("direction", "operator", "site", "level", "scope")
MARKS = ("o-", "s--", "^-.", "D:")
RED = "crimson"
UNITS: dict[str | None, str] = {
    "": "coefficient (residual units)",
    "dose": "dose (coefficient / median residual norm)",
    "max": "coefficient (shares of the feature's largest activation)",
    "deg": "angle (degrees)",
}
LATENT = "coefficient (activation of the feature)"
ROLES = {
    "chosen": "chosen cell",
    "flip": "its sign turned",
    "wrong_layer": "another layer",
    "random": "random directions",
    "features": "matched features",
    "shuffled": "shuffled labels",
    "null": "random directions,\neach in its own best cell",
}
SMALL, TEXT = 8.0, 9.0  # points

Record = Mapping[str, Any]


def save(figure: "Figure", path: Path) -> Path:
    """Writes a figure as .png, .svg or .pdf, whole or not at all."""
    kind = path.suffix.lstrip(".") or "png"
    # without a date the same table gives the same file
    dated: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {}
    with whole(path) as part:
        figure.savefig(part, format=kind, dpi=150, **dated)
    return path


# --- a study's grid -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spot:
    """A line of a grid with its place: which panel, which row of it (a site), how strong."""

    record: Record
    group: tuple[str, str, str, str]  # direction, operator, scope, component
    row: str
    order: tuple[float, ...]
    unit: str | None
    value: float

    @classmethod
    def of(cls, record: Record) -> "_Spot":
        name, operator, site, level, scope = (str(record[key]) for key in SETTING)
        if not operator:  # a whole line of interventions is a cell of its own
            group = ("", "", "", "")
            return cls(record, group, textwrap.shorten(name, 60), (-record["cell"],), None, 0.0)
        one = re.fullmatch(r"(\w+) ([\dh,-]+)", site)
        component, where = one.groups() if one else ("", site)
        order = tuple(float(n) for n in re.findall(r"\d+", where))
        strength, _, unit = level.partition(" ")
        group = (name, operator, scope, component)
        if not strength:
            return cls(record, group, where, order, None, 0.0)
        return cls(record, group, where, order, unit, float(strength))

    @property
    def effect(self) -> float:
        return _number(self.record["effect"])

    def is_at(self, chosen: Record | None) -> bool:
        return chosen is not None and all(str(self.record[k]) == str(chosen[k]) for k in SETTING)


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

    spots = _spots(grid, metrics)
    groups = list(dict.fromkeys(s.group for s in spots))
    kept = _largest(groups, spots, chosen, most)
    names = _names(kept)
    notes = []
    if len(kept) < len(groups):
        notes.append(f"{len(kept)} of {len(groups)} panels, those with the largest effects")
    shown = [s for s in spots if s.group in kept]
    asked = list(dict.fromkeys(str(s.record["metric"]) for s in shown))
    panels = {
        metric: [
            _Panel(names[g], mine)
            for g in kept
            if (mine := [s for s in shown if (s.group, s.record["metric"]) == (g, metric)])
        ]
        for metric in asked
    }
    every = [panel for some in panels.values() for panel in some]
    wide = max(panel.width for panel in every)
    across = max(1, min(len(kept), int(6.6 / wide)))
    down = math.ceil(len(kept) / across)
    beside = 1 if len(kept) > 1 else min(len(asked), 3)  # metrics next to each other
    below = math.ceil(len(asked) / beside)
    size = (
        max(3.5, beside * (across * wide + 0.9)),
        below * down * (max(panel.height for panel in every) + 0.2) + 0.9,
    )
    figure = Figure(figsize=size, layout="constrained")
    parts = figure.subfigures(below, beside, squeeze=False).flat
    for part, (metric, some) in zip(parts, panels.items(), strict=False):
        _heat_of_metric(part, metric, some, chosen, (down, across))
    _legend(figure, _marks_of(every, chosen), "; ".join(notes), low=True)
    return _literal(figure)


@dataclass(frozen=True)
class _Panel:
    """The cells of one panel of a heat map."""

    name: str
    spots: Sequence[_Spot]
    rows: list[str] = field(init=False)
    columns: list[tuple[str | None, float]] = field(init=False)

    def __post_init__(self) -> None:
        rows = sorted({(s.order, s.row) for s in self.spots})
        columns = sorted({(s.unit or "", s.value, s.unit is None) for s in self.spots})
        object.__setattr__(self, "rows", [row for _, row in rows])
        object.__setattr__(self, "columns", [(None if no else u, v) for u, v, no in columns])

    @property
    def numbered(self) -> bool:
        """Whether there is room for numbers in the cells."""
        return len(self.rows) <= 40 and len(self.columns) <= 12

    @property
    def width(self) -> float:
        """Inches."""
        longest = max(map(len, self.rows), default=0)
        cell = 0.43 if self.numbered else 0.2
        return max(1.4, cell * len(self.columns)) + 0.065 * longest + 0.3

    @property
    def height(self) -> float:
        """Inches."""
        return max(0.7, (0.23 if self.numbered else 0.11) * len(self.rows)) + 0.75

    def at(self, spot: _Spot) -> tuple[int, int]:
        """Its column and row."""
        return self.columns.index((spot.unit, spot.value)), self.rows.index(spot.row)


def _heat_of_metric(
    part: "SubFigure",
    metric: str,
    panels: Sequence[_Panel],
    chosen: Record | None,
    shape: tuple[int, int],
) -> None:
    peak = max((abs(s.effect) for p in panels for s in p.spots if s.effect == s.effect), default=0)
    peak = peak or 1.0
    axes = part.subplots(*shape, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        image = _heat(axis, panel, chosen, peak)
    used = [axis for axis in axes.flat][: len(panels)]
    tall = sum(panel.height for panel in panels[: shape[0]])
    bar = part.colorbar(image, ax=used, shrink=min(1.0, 2.6 / tall), anchor=(0, 1), aspect=18)
    bar.set_label(f"effect on {_axis(metric)}", fontsize=TEXT)
    bar.ax.tick_params(labelsize=SMALL)
    labels = {_strength(panel.spots) for panel in panels}
    if len(labels) == 1:  # said once for all panels
        part.supxlabel(textwrap.fill(labels.pop(), 44), fontsize=TEXT)
    else:
        for axis, panel in zip(axes.flat, panels, strict=False):
            axis.set_xlabel(textwrap.fill(_strength(panel.spots), 24), fontsize=SMALL)


def _heat(axis: "Axes", panel: _Panel, chosen: Record | None, peak: float) -> Any:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.patches import Ellipse, Rectangle
    from matplotlib.patheffects import withStroke

    shades = colormaps["cividis"]
    values = np.full((len(panel.rows), len(panel.columns)), np.nan)
    for spot in panel.spots:
        x, y = panel.at(spot)
        values[y, x] = spot.effect
    image = axis.imshow(
        np.ma.masked_invalid(values), cmap=shades, vmin=-peak, vmax=peak, aspect="auto",
        origin="lower",
    )  # fmt: skip
    halo = [withStroke(linewidth=3.2, foreground="white")]
    digits = _digits(peak)
    for spot in panel.spots:
        x, y = panel.at(spot)
        lit = spot.effect > -0.05 * peak
        ink = "black" if lit else "white"
        if not spot.record.get("passes", True):
            axis.add_patch(
                Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", lw=0, ec=ink,
                          alpha=0.55, label="beyond a limit")
            )  # fmt: skip
        if panel.numbered:
            known = spot.effect == spot.effect
            said = _signed(spot.effect, digits) if known else "none"
            back = {"fc": shades(0.5 + 0.5 * spot.effect / peak), "ec": "none", "pad": 0.6}
            axis.text(
                x, y, said, ha="center", va="center", fontsize=7.5, color=ink if known else "black",
                bbox=back if known and not spot.record.get("passes", True) else None,
            )  # fmt: skip
        if spot.record.get("best", False):
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
    axis.set_xticks(range(len(panel.columns)), [_level(panel, c) for c in panel.columns])
    step = 1 if panel.numbered else math.ceil(len(panel.rows) / 20)
    axis.set_yticks(range(0, len(panel.rows), step), panel.rows[::step])
    axis.tick_params(labelsize=SMALL, length=2)
    components = {spot.group[3] for spot in panel.spots}
    if components != {""}:
        axis.set_ylabel(f"layer ({components.pop()})", fontsize=TEXT)
    axis.set_title(textwrap.fill(panel.name, 30), fontsize=TEXT)
    return image


def _level(panel: _Panel, column: tuple[str | None, float]) -> str:
    unit, value = column
    if unit is None:
        return panel.spots[0].group[1]
    mixed = len({u for u, _ in panel.columns}) > 1
    return _minus(f"{value:g} {unit}".strip() if mixed else f"{value:g}")


def _marks_of(panels: Iterable[_Panel], chosen: Record | None) -> list[tuple[Any, str]]:
    """Legend entries for the marks that occur."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    spots = [spot for panel in panels for spot in panel.spots]
    found: list[tuple[Any, str]] = []
    if any(s.is_at(chosen) for s in spots):
        ring = Line2D([], [], marker="o", ls="", ms=11, mfc="none", mec=RED, mew=2.2)
        found.append((ring, "chosen"))
    if any(s.record.get("best", False) for s in spots):
        found.append((Patch(fc="none", ec="black", lw=1.5), "not excluded from being best"))
    if not all(s.record.get("passes", True) for s in spots):
        found.append((Patch(fc="none", ec="grey", hatch="////", lw=0), "beyond a limit"))
    return found


# --- lines ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """A named line: `(x, y, low, high)` of each point; without a band `low` is NaN."""

    name: str
    points: Sequence[tuple[float, float, float, float]]
    ringed: Collection[float] = ()


def curves(
    grid: pd.DataFrame,
    metrics: Sequence[str] = (),
    chosen: Record | None = None,
    most: int = 8,
) -> "Figure":
    """Effect against strength with simultaneous bands, a panel a metric, a line a layer.

    Strength is the coefficient in the unit in which the study gives it; of several units it is the
    dose where every cell has one, else the length.

    Args:
        grid: `Findings.grid`.
        metrics: which, default all.
        chosen: the setting of the chosen cell, ringed.
        most: lines. Of more, those of the chosen cell's direction, operator and scope are drawn; of
            still more, evenly spaced layers; the figure says so.

    Raises:
        RequestError: no cell differs from another in strength alone, or there is no such metric.
    """
    spots = [s for s in _spots(grid, metrics) if s.unit is not None]
    label = _strength(spots)
    if len({s.unit for s in spots}) > 1:
        dosed = all(_known(s.record["dose"]) for s in spots)
        column, label = ("dose", UNITS["dose"]) if dosed else ("coefficient", UNITS[""])
        spots = [replace(s, value=float(s.record[column])) for s in spots]
    lines: dict[tuple[Any, ...], list[_Spot]] = {}
    for spot in spots:
        lines.setdefault((spot.group, spot.order, spot.row), []).append(spot)
    lines = {key: some for key, some in lines.items() if len({s.value for s in some}) > 1}
    if not lines:
        raise RequestError("no cells differ in strength alone: there is no curve")
    keys, notes = list(lines), []
    if len(keys) > most:
        groups = list(dict.fromkeys(key[0] for key in keys))
        (group,) = _largest(groups, [s for some in lines.values() for s in some], chosen, 1)
        keys = [key for key in keys if key[0] == group]
        if len(groups) > 1:
            notes.append(f"of {len(groups)} combinations only {_names([group])[group]}")
    if len(keys) > most:
        ringed = [key for key in keys if any(s.is_at(chosen) for s in lines[key])]
        notes.append(f"{most} of {len(keys)} layers, evenly spaced")
        keys = _evenly(sorted(keys, key=lambda key: key[1]), most, ringed)
    names = _names(list(dict.fromkeys(key[0] for key in keys)), single="")
    by_layer = len({key[2] for key in keys}) > 1

    def of(metric: str) -> list[_Line]:
        drawn = []
        for key in keys:
            mine = [s for s in lines[key] if s.record["metric"] == metric]
            parts = [names[key[0]], f"layer {key[2]}" if by_layer else ""]
            name = ", ".join(filter(None, parts)) or _names([key[0]])[key[0]]
            points = [_point(s.record, s.value, "effect") for s in mine]
            drawn.append(_Line(name, points, [s.value for s in mine if s.is_at(chosen)]))
        return drawn

    asked = list(dict.fromkeys(str(s.record["metric"]) for s in spots))
    titles = {}
    for metric in asked:
        before = {_number(s.record["unsteered"]) for s in spots if s.record["metric"] == metric}
        titles[metric] = f"{metric}, unsteered {min(before):.3g}" if len(before) == 1 else metric
    figure = _lines({m: of(m) for m in asked}, label, titles, zero="unsteered")
    _say(figure, notes)
    return _literal(figure)


def profile(
    table: pd.DataFrame,
    metrics: Sequence[str] = (),
    chosen: Record | None = None,
    most: int = 8,
) -> "Figure":
    """A metric against the layer, with bands; a panel a metric, a line for each setting.

    Args:
        table: one row for each setting, metric and layer: `layer`; `effect`, `change` or
            `estimate`; perhaps `low` and `high`; perhaps `metric` or `score`; further columns that
            tell the settings apart, such as `component`, `method`, `head`. So the `summary()` of
            an ablation, or `Findings.grid`, of which one operator, strength and scope is drawn.
        metrics: which, default all.
        chosen: the setting of a grid's chosen cell: says which strength, and is ringed. Default the
            strength with the largest effect.
        most: lines, those with the largest effects; the figure says if there were more.

    Raises:
        RequestError: a column is missing, or a layer has several rows.
    """
    value = next((c for c in ("effect", "change", "estimate") if c in table), None)
    if value is None or "layer" not in table:
        raise RequestError("a layer profile needs the columns layer, and effect or change")
    panel = next((c for c in ("metric", "score") if c in table), None)
    rows = [r for r in as_records(table) if _known(r["layer"]) and _known(r[value])]
    if panel is not None and metrics:
        rows = [r for r in rows if r[panel] in metrics]
    if not rows:
        raise RequestError("the table has no rows to draw")
    title = ""
    if "site" in table:
        best = chosen or max(rows, key=lambda r: abs(float(r[value])))
        fixed = ("operator", "level", "scope")
        rows = [_with_part(r) for r in rows if all(str(r[k]) == str(best[k]) for k in fixed)]
        title = f"{best['operator']}, {best['level']}".strip(", ")
    names = ("component", "method", "direction", "operator", "level", "scope", "head")
    apart = [c for c in names if c in rows[0] and len({str(r[c]) for r in rows}) > 1]
    panels: dict[str, dict[str, list[Record]]] = {}
    heights: dict[str, float] = {}  # of each line its largest effect, over its panels
    for r in rows:
        line = ", ".join(str(r[c]) for c in apart)
        panels.setdefault(str(r[panel]) if panel else value, {}).setdefault(line, []).append(r)
        heights[line] = max(heights.get(line, 0.0), abs(float(r[value])))
    for lines in panels.values():
        for line, mine in lines.items():
            if len({r["layer"] for r in mine}) < len(mine):
                raise RequestError(
                    f"{line or 'a line'} has several rows for one layer: take one strength, or a "
                    "summary over prompts"
                )
    largest = sorted(heights, key=lambda line: -heights[line])[:most]
    kept = [line for line in heights if line in largest]

    def drawn(line: str, mine: Sequence[Record]) -> _Line:
        ring = [r for r in mine if chosen and all(str(r[k]) == str(chosen[k]) for k in SETTING)]
        points = [_point(r, r["layer"], value) for r in mine]
        return _Line(line, points, [float(r["layer"]) for r in ring])

    of = "effect on" if value == "effect" else "change in"
    spans = any(r.get("last", r["layer"]) != r["layer"] for r in rows)
    figure = _lines(
        {name: [drawn(k, lines.get(k, [])) for k in kept] for name, lines in panels.items()},
        "first layer of the span" if spans else "layer",
        dict.fromkeys(panels, title) if title else {},
        zero="unsteered" if "site" in table else "no change",
        labels={name: f"{of} {_axis(name)}" if panel else name for name in panels},
    )
    more = len(heights) - len(kept)
    _say(figure, [f"{more} lines with smaller effects left out"] if more else [])
    return _literal(figure)


def _with_part(record: Record) -> dict[str, Any]:
    """A line of a grid with its component; of layers steered together, with their number."""
    spot = _Spot.of(record)
    several = f", {spot.order[1] - spot.order[0] + 1:g} layers" if len(spot.order) == 2 else ""
    return {**record, "component": spot.group[3] + several}


def dose_response(
    table: pd.DataFrame,
    panels: dict[str, str],
    unsteered: dict[str, float],
    chosen: Sequence[tuple[str, float]],
    path: Path,
) -> Path:
    """Measures against dose: one panel a measure, the chosen cells ringed.

    Args:
        table: columns `line`, `dose` and the measures; one row for each (line, dose).
        panels: measure -> what its axis is called.
        unsteered: measure -> its value without steering, a dashed line.
        chosen: (line, dose) of each.
        path: a .png or .svg file, written whole or not at all.
    """
    names = list(dict.fromkeys(str(name) for name in table["line"]))
    drawn = {
        measure: [
            _Line(
                name,
                [_point(r, r["dose"], measure, band=False) for r in records],
                [dose for line, dose in chosen if line == name],
            )
            for name in names
            for records in [[r for r in as_records(table) if r["line"] == name]]
        ]
        for measure in panels
    }
    figure = _lines(drawn, UNITS["dose"], {}, "unsteered", labels=panels, base=unsteered)
    return save(_literal(figure), path)


def _lines(
    panels: Mapping[str, Sequence[_Line]],
    strength: str,
    titles: Mapping[str, str],
    zero: str,
    labels: Mapping[str, str] | None = None,
    base: Mapping[str, float] | None = None,
) -> "Figure":
    """A panel for each measure, the same lines in each, and what is unsteered as a dashed one."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(max(4.4, 3.5 * across), 3.1 * down + 0.9), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    shades = colormaps["viridis"]
    for axis, (measure, lines) in zip(axes.flat, panels.items(), strict=False):
        for i, line in enumerate(lines):
            points = sorted(line.points)
            colour = shades(0.85 * i / max(1, len(lines) - 1))
            x = [point[0] for point in points]
            y = [point[1] for point in points]
            axis.plot(x, y, MARKS[i % len(MARKS)], color=colour, ms=4, lw=1.6, label=line.name)
            low, high = [point[2] for point in points], [point[3] for point in points]
            if any(v == v for v in low):
                faint = 0.16 if len(lines) < 4 else 0.1
                axis.fill_between(x, low, high, color=colour, alpha=faint, lw=0)
            at = [point for point in points if point[0] in line.ringed]
            axis.plot(
                [p[0] for p in at], [p[1] for p in at], "o", ms=11, mfc="none", mec=RED, mew=2,
                label="_chosen", zorder=5,
            )  # fmt: skip
        level = base[measure] if base else 0.0
        axis.axhline(level, color="0.35", ls=(0, (6, 3)), lw=1.2, label=zero)
        axis.set_xlabel(strength, fontsize=TEXT)
        said = labels[measure] if labels else f"effect on {_axis(measure)}"
        axis.set_ylabel(textwrap.fill(said, 34), fontsize=TEXT)
        if measure in titles:
            axis.set_title(titles[measure], fontsize=TEXT, loc="left")
        strengths = sorted({point[0] for line in lines for point in line.points})
        if strength.endswith(("layer", "span")):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        elif _apart(strengths):
            axis.set_xticks(strengths, [_minus(f"{x:.3g}") for x in strengths])
        _bare(axis)
        if base:  # measures rather than effects: from 0
            tops = [point[1] for line in lines for point in line.points if point[1] == point[1]]
            top = max([level, *tops])
            axis.set_ylim(-0.04 * top, 1.08 * top)
    first = axes.flat[0].get_legend_handles_labels()
    entries = [(handle, name) for handle, name in zip(*first, strict=True) if name]
    if any(line.ringed for lines in panels.values() for line in lines):
        from matplotlib.lines import Line2D

        entries.append((Line2D([], [], marker="o", ls="", ms=10, mfc="none", mec=RED, mew=2),
                        "chosen"))  # fmt: skip
    _legend(figure, entries)
    return figure


# --- controls -------------------------------------------------------------------------------------


def controls(
    nulls: pd.DataFrame, claims: pd.DataFrame, metric: str, p: pd.DataFrame | None = None
) -> "Figure":
    """Effects of the null directions beside the chosen cell's: a strip for each kind of control.

    The chosen cell's effect and its interval run down all strips. Sign flip and wrong layer have a
    strip of their own.

    Args:
        nulls, claims, p: of `Findings`; p is written beside the strip.
        metric: which.

    Raises:
        RequestError: there is no effect of the chosen cell in this metric.
    """
    from matplotlib.figure import Figure

    mine = [] if claims.empty else [r for r in as_records(claims) if r["metric"] == metric]
    single = {str(r["role"]): r for r in mine if _known(r["effect"])}
    if "chosen" not in single:
        raise RequestError(f"no chosen cell has an effect on {metric}")
    strips: dict[str, list[float]] = {}
    for r in as_records(nulls):
        if r["metric"] == metric:
            strips.setdefault(str(r["role"]), []).append(float(r["effect"]))
    values = {} if p is None else {r["control"]: r for r in as_records(p) if r["metric"] == metric}
    rows = [role for role in ROLES if role in single or role in strips]
    heights = [0.45 if role in single else 0.75 for role in rows]
    figure = Figure(figsize=(4.5, sum(heights) + 1.0), layout="constrained")
    axis = figure.subplots()
    chosen = single["chosen"]
    if _known(chosen["low"]):
        axis.axvspan(chosen["low"], chosen["high"], color=RED, alpha=0.13, lw=0, label="_interval")
    axis.axvline(chosen["effect"], color=RED, lw=1.6, label="_chosen")
    axis.axvline(0, color="0.35", ls=(0, (6, 3)), lw=1.1, label="_unsteered")
    top, ticks, names = 0.0, [], []
    for i, (role, height) in enumerate(zip(rows, heights, strict=True)):
        y = top - height / 2
        top -= height
        name = ROLES[role]
        if role in single:
            _interval(axis, single[role], y, RED if role == "chosen" else "black")
        else:
            effects = strips[role]
            axis.plot(
                effects, [y + 0.36 * height * d for d in _spread(effects)], MARKS[i % 4][0],
                ms=4.5, mfc=(0.15, 0.35, 0.55, 0.8), mec="white", mew=0.4, label=role, zorder=3,
            )  # fmt: skip
            mean = sum(effects) / len(effects)
            axis.plot([mean, mean], [y - 0.44 * height, y + 0.44 * height], color="black", lw=1.6)
            name += f"\nn {len(effects)}"
            if role in values:
                name += f", p {values[role]['p']:.3f}"
        ticks.append(y)
        names.append(name)
    axis.set_yticks(ticks, names)
    axis.set_ylim(top - 0.1, 0.1)
    axis.set_xlabel(f"effect on {_axis(metric)}", fontsize=TEXT)
    _bare(axis)
    axis.grid(visible=False, axis="y")
    notes = ["solid line: the chosen cell" + (", with its interval" * _known(chosen["low"]))]
    notes.append("dashed: unsteered")
    if strips:
        notes.append("a dot a null direction; black bar: their mean")
    _say(figure, notes)
    return _literal(figure)


def _interval(axis: "Axes", record: Record, y: float, colour: str) -> None:
    if _known(record["low"]):
        axis.plot([record["low"], record["high"]], [y, y], color=colour, lw=2, label="_interval")
    axis.plot([record["effect"]], [y], "D", color=colour, ms=6, label=str(record["role"]))


def _spread(values: Sequence[float], bins: int = 48) -> list[float]:
    """Offsets from -1 to 1 that keep the dots of near-equal values apart."""
    low, high = min(values), max(values)
    step = (high - low) / bins or 1.0
    column = [int((v - low) / step) for v in values]
    counts = {c: column.count(c) for c in column}
    tallest = max(4, *counts.values())
    seen: dict[int, int] = {}
    offsets = []
    for c in column:
        seen[c] = seen.get(c, 0) + 1
        offsets.append((2 * seen[c] - counts[c] - 1) / tallest)
    return offsets


# --- shared ---------------------------------------------------------------------------------------


def as_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as mappings."""
    return [{str(k): v for k, v in r.items()} for r in table.to_dict("records")]


def _spots(grid: pd.DataFrame, metrics: Sequence[str]) -> list[_Spot]:
    records = as_records(grid)
    there = list(dict.fromkeys(str(r["metric"]) for r in records))
    if missing := [name for name in metrics if name not in there]:
        raise RequestError(f"the grid has no {missing[0]}; it has {', '.join(there) or 'nothing'}")
    if not records:
        raise RequestError("the grid is empty")
    asked = metrics or there
    return [_Spot.of(r) for name in asked for r in records if r["metric"] == name]


def _largest(
    groups: Sequence[Any], spots: Sequence[_Spot], chosen: Record | None, most: int
) -> list[Any]:
    """The groups with the largest effects on the first metric, the chosen cell's before others."""
    metric = spots[0].record["metric"]
    rank: dict[Any, tuple[bool, float]] = {}
    for s in spots:
        if s.record["metric"] == metric:
            ringed, tall = rank.get(s.group, (False, 0.0))
            size = abs(s.effect) if s.effect == s.effect else 0.0
            rank[s.group] = ringed or s.is_at(chosen), max(tall, size)
    kept = sorted(groups, key=lambda g: rank.get(g, (False, 0.0)), reverse=True)[:most]
    return [g for g in groups if g in kept]


def _names(groups: Sequence[Any], single: str | None = None) -> dict[Any, str]:
    """Groups by what tells them apart; one alone by all that it is, or as told."""
    if len(groups) == 1:
        (name, operator, scope, _) = groups[0]
        on = f" on {scope}" if scope not in ("", "all") else ""
        whole_name = f"{operator}({name}){on}" if operator else "interventions"
        return {groups[0]: whole_name if single is None else single}
    apart = [i for i in range(4) if len({g[i] for g in groups}) > 1]
    return {g: ", ".join(g[i] for i in apart if g[i]) or "interventions" for g in groups}


def _evenly(keys: Sequence[Any], most: int, keep: Sequence[Any]) -> list[Any]:
    """`most` of a sequence, first and last among them, with `keep` in place of its neighbour."""
    at = [round(i * (len(keys) - 1) / max(1, most - 1)) for i in range(most)]
    for one in keep:
        here = keys.index(one)
        if here not in at:
            at[min(range(most), key=lambda i: abs(at[i] - here))] = here
    return [keys[i] for i in at]


def _strength(spots: Sequence[_Spot]) -> str:
    """What the axis of coefficients is called; nothing where there are none."""
    units = {s.unit for s in spots}
    if units == {""} and all(s.group[1] == "latent_clamp" for s in spots):
        return LATENT
    if len(units) > 1:
        return "coefficient"
    return UNITS.get(units.pop() if units else None, "")


def _point(r: Record, x: float, y: str, band: bool = True) -> tuple[float, float, float, float]:
    low, high = (r.get("low"), r.get("high")) if band else (None, None)
    return float(x), _number(r[y]), _number(low), _number(high)


def _apart(values: Sequence[float]) -> bool:
    """Whether numbers in rising order are few and far enough apart to be an axis's ticks."""
    gaps = [b - a for a, b in itertools.pairwise(values)]
    return len(values) <= 8 and min(gaps, default=0.0) > 0.09 * (values[-1] - values[0])


def _known(value: Any) -> bool:
    return value is not None and value is not pd.NA and not math.isnan(value)


def _number(value: Any) -> float:
    return float(value) if _known(value) else math.nan


def _axis(metric: str) -> str:
    return METRICS[metric].axis if metric in METRICS else metric


def _digits(peak: float) -> int:
    """Decimals that show two places of the largest number."""
    size = math.floor(math.log10(peak))
    return min(4, max(0, 1 - size if size < 0 else 2 - size))


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return _minus(text if float(text) else "0")


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _literal(figure: "Figure") -> "Figure":
    """The figure, with no text of it read as a formula or holding what a file cannot."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_parse_math(False)
            text.set_text(safe(text.get_text()))
    return figure


def _bare(axis: "Axes") -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=SMALL)
    axis.margins(y=0.08)


def _legend(
    figure: "Figure", entries: Sequence[tuple[Any, str]], note: str = "", low: bool = False
) -> None:
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


def _say(figure: "Figure", notes: Sequence[str]) -> None:
    """Small print below a figure."""
    if notes:
        said = textwrap.fill("; ".join(notes), int(13.5 * figure.get_figwidth()))
        figure.supxlabel(said, x=0.01, ha="left", fontsize=SMALL, color="0.3")
