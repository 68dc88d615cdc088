"""Pictures of tables other than the heat map, each a function from a table to a matplotlib figure.

Lines differ in lightness, hue and marks: see `marks`.
"""

import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp_steer.errors import RequestError
from interp_steer.report import marks
from interp_steer.report.marks import MARKS, RED, TEXT, Record, axis_name, number
from interp_steer.report.page import as_records
from interp_steer.report.spots import UNITS, Spot, largest, names, spots, strength

save = marks.save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROLES = {
    "chosen": "chosen cell",
    "flip": "its sign turned",
    "wrong_layer": "another layer",
    "random": "random directions",
    "features": "matched features",
    "shuffled": "shuffled labels",
    "null": "random directions,\neach in its own best cell",
}


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
    cells = [s for s in spots(grid, metrics) if s.unit is not None]
    label = strength(cells)
    if len({s.unit for s in cells}) > 1:
        dosed = all(pd.notna(s.record["dose"]) for s in cells)
        column, label = ("dose", UNITS["dose"]) if dosed else ("coefficient", UNITS[""])
        cells = [replace(s, value=float(s.record[column])) for s in cells]
    lines: dict[tuple[Any, ...], list[Spot]] = {}
    for spot in cells:
        lines.setdefault((spot.group, spot.order, spot.row), []).append(spot)
    lines = {key: some for key, some in lines.items() if len({s.value for s in some}) > 1}
    if not lines:
        raise RequestError("no cells differ in strength alone: there is no curve")
    keys, notes = list(lines), []
    if len(keys) > most:
        (group,) = largest(list(itertools.chain(*lines.values())), chosen, 1)
        if (count := len({key[0] for key in keys})) > 1:
            notes.append(f"of {count} combinations only {names([group])[group]}")
        keys = [key for key in keys if key[0] == group]
    if len(keys) > most:
        ringed = [key for key in keys if any(s.is_at(chosen) for s in lines[key])]
        notes.append(f"{most} of {len(keys)} layers, evenly spaced")
        keys = _evenly(sorted(keys, key=lambda key: key[1]), most, ringed)
    groups = list(dict.fromkeys(key[0] for key in keys))
    name = names(groups)
    by_layer = len({key[2] for key in keys}) > 1

    def drawn(key: tuple[Any, ...], metric: str) -> _Line:
        mine = [s for s in lines[key] if s.record["metric"] == metric]
        parts = [name[key[0]]] if len(groups) > 1 or not by_layer else []
        parts += [f"layer {key[2]}"] if by_layer else []
        points = [_point(s.record, s.value, "effect") for s in mine]
        return _Line(", ".join(parts), points, [s.value for s in mine if s.is_at(chosen)])

    titles: dict[str, str] = {}
    axes = {str(s.record["metric"]): axis_name(str(s.record["metric"]), s.record) for s in cells}
    for metric in axes:
        before = {number(s.record["unsteered"]) for s in cells if s.record["metric"] == metric}
        titles[metric] = f"{metric}, unsteered {min(before):.3g}" if len(before) == 1 else metric
    panels = {metric: [drawn(key, metric) for key in keys] for metric in titles}
    labels = {metric: f"effect on {axis}" for metric, axis in axes.items()}
    figure = _lines(panels, label, labels, titles)
    marks.small_print(figure, notes)
    return marks.literal(figure)


def profile(
    table: pd.DataFrame,
    metrics: Sequence[str] = (),
    chosen: Record | None = None,
    most: int = 8,
    label: str = "",
) -> "Figure":
    """A metric against the layer, with bands; a panel a metric, a line for each setting.

    Args:
        table: the `summary()` of an ablation, or `Findings.grid`, of which one operator, strength
            and scope is drawn.
        metrics: which metrics of a grid or scores of an ablation, default all.
        chosen: the setting of a grid's chosen cell: says which strength, and is ringed. Default the
            strength with the largest effect.
        most: lines, those with the largest effects; the figure says if there were more.
        label: what the numbers are, where they are no changes.

    Raises:
        RequestError: a column is missing, or a layer has several rows.
    """
    is_grid = "effect" in table and "estimate" not in table
    value, panel = ("effect", "metric") if is_grid else ("estimate", "score")
    if missing := [name for name in ("layer", value, panel) if name not in table]:
        raise RequestError(f"a layer profile needs a column {missing[0]}")
    rows = [r for r in as_records(table) if pd.notna(r["layer"]) and pd.notna(r[value])]
    rows = [r for r in rows if not metrics or r[panel] in metrics]
    if not rows:
        raise RequestError("the table has no rows to draw")
    title = ""
    if is_grid:
        best = chosen or max(rows, key=lambda r: abs(float(r[value])))
        fixed = ("operator", "level", "scope")
        rows = [r for r in rows if all(str(r[k]) == str(best[k]) for k in fixed)]
        rows = [_placed(r, chosen) for r in rows]
        title = f"{best['operator']}, {best['level']}".strip(", ")
    settings = ("component", "method", "direction", "head")
    apart = [c for c in settings if c in rows[0] and len({str(r[c]) for r in rows}) > 1]
    panels: dict[str, dict[str, list[Record]]] = {}
    heights: dict[str, float] = {}  # of each line its largest effect, over its panels
    for r in rows:
        line = ", ".join(str(r[c]) for c in apart)
        mine = panels.setdefault(str(r[panel]), {}).setdefault(line, [])
        if any(r["layer"] == other["layer"] for other in mine):
            raise RequestError(f"{line or 'a line'} has several rows for one layer")
        mine.append(r)
        heights[line] = max(heights.get(line, 0.0), abs(float(r[value])))
    largest = sorted(heights, key=lambda line: -heights[line])[:most]

    def drawn(line: str, mine: Sequence[Record]) -> _Line:
        points = [_point(r, r["layer"], value) for r in mine]
        return _Line(line, points, [float(r["layer"]) for r in mine if r.get("ringed")])

    axes = {str(r[panel]): axis_name(str(r[panel]), r) for r in rows}
    spans = any(r.get("last", r["layer"]) != r["layer"] for r in rows)
    of = "effect on" if is_grid else "change in"
    figure = _lines(
        {m: [drawn(k, some.get(k, [])) for k in heights if k in largest]
         for m, some in panels.items()},
        "first layer of the span" if spans else "layer",
        {metric: label or f"{of} {axes[metric]}" for metric in panels},
        dict.fromkeys(panels, title),
        zero="unsteered" if is_grid else "" if label else "no change",
    )  # fmt: skip
    more = len(heights) - len(largest)
    marks.small_print(figure, [f"{more} lines with smaller effects left out"] if more else [])
    return marks.literal(figure)


def _placed(record: Record, chosen: Record | None) -> dict[str, Any]:
    """A line of a grid with its component; of layers steered together, with their number."""
    spot = Spot.of(record)
    several = f", {spot.order[1] - spot.order[0] + 1:g} layers" if len(spot.order) == 2 else ""
    return {**record, "component": spot.group[3] + several, "ringed": spot.is_at(chosen)}


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
    lines: dict[str, list[Record]] = {}
    for r in as_records(table):
        lines.setdefault(str(r["line"]), []).append(r)

    def drawn(name: str, measure: str) -> _Line:
        points = [(float(r["dose"]), number(r[measure]), math.nan, math.nan) for r in lines[name]]
        return _Line(name, points, [dose for line, dose in chosen if line == name])

    drawing = {measure: [drawn(name, measure) for name in lines] for measure in panels}
    figure = _lines(drawing, UNITS["dose"], panels, {}, base=unsteered)
    return marks.save(marks.literal(figure), path)


def _lines(
    panels: Mapping[str, Sequence[_Line]],
    x_label: str,
    labels: Mapping[str, str],
    titles: Mapping[str, str],
    zero: str = "unsteered",
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
    for axis, (measure, lines) in zip(axes.flat, panels.items(), strict=False):
        for i, line in enumerate(lines):
            colour = colormaps["viridis"](0.85 * i / max(1, len(lines) - 1))
            points = sorted(line.points)
            x, y, low, high = ([point[j] for point in points] for j in range(4))
            axis.plot(x, y, MARKS[i % len(MARKS)], color=colour, ms=4, lw=1.6, label=line.name)
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
        axis.set_xlabel(x_label, fontsize=TEXT)
        axis.set_ylabel(textwrap.fill(labels[measure], 34), fontsize=TEXT)
        axis.set_title(titles.get(measure, ""), fontsize=TEXT, loc="left")
        ticks = sorted({point[0] for line in lines for point in line.points})
        if x_label.endswith(("layer", "span")):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        elif len(ticks) <= 12:
            axis.set_xticks(*_apart(ticks))
        marks.bare(axis)
        if base:  # measures rather than effects: from 0
            tops = [point[1] for line in lines for point in line.points]
            top = max([level, *tops])  # NaN is never more
            axis.set_ylim(-0.04 * top, 1.08 * top)
    first = axes.flat[0].get_legend_handles_labels()
    entries = [(handle, name) for handle, name in zip(*first, strict=True) if name]
    if any(line.ringed for lines in panels.values() for line in lines):
        entries.append((marks.ring(), "chosen"))
    marks.legend(figure, entries)
    return figure


# --- controls -------------------------------------------------------------------------------------


def _role(claim: Mapping[str, Any]) -> str:
    """What a claim is of; prompts in place of steering each by its name."""
    role = str(claim["role"])
    return f"prompt {claim['direction']}" if role == "prompted" else role


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

    mine = [r for r in as_records(claims) if r["metric"] == metric and pd.notna(r["effect"])]
    single = {_role(r): r for r in mine}
    if "chosen" not in single:
        raise RequestError(f"no chosen cell has an effect on {metric}")
    strips: dict[str, list[float]] = {}
    for r in as_records(nulls):
        if r["metric"] == metric and pd.notna(r["effect"]):
            strips.setdefault(r["role"], []).append(float(r["effect"]))
    chances = () if p is None else [r for r in as_records(p) if r["metric"] == metric]
    chance = {r["control"]: r for r in chances}
    known = [*ROLES, *(role for role in single if role not in ROLES)]
    rows = [role for role in known if role in single or role in strips]
    heights = [0.45 if role in single else 0.75 for role in rows]
    figure = Figure(figsize=(4.5, sum(heights) + 1.0), layout="constrained")
    axis = figure.subplots()
    chosen = single["chosen"]
    banded = bool(pd.notna(chosen["low"]))
    if banded:
        axis.axvspan(chosen["low"], chosen["high"], color=RED, alpha=0.13, lw=0, label="_interval")
    axis.axvline(chosen["effect"], color=RED, lw=1.6, label="_chosen")
    axis.axvline(0, color="0.35", ls=(0, (6, 3)), lw=1.1, label="_unsteered")
    top, ticks, said = 0.0, [], []
    for i, (role, height) in enumerate(zip(rows, heights, strict=True)):
        y = top - height / 2
        top -= height
        ticks.append(y)
        said.append(ROLES.get(role, role))
        if role in single:
            r, ink = single[role], RED if role == "chosen" else "black"
            if pd.notna(r["low"]):
                axis.plot([r["low"], r["high"]], [y, y], color=ink, lw=2, label="_interval")
            axis.plot([r["effect"]], [y], "D", color=ink, ms=6, label=role)
            continue
        effects = strips[role]
        axis.plot(
            effects, [y + 0.36 * height * d for d in _spread(effects)], MARKS[i % 4][0],
            ms=4.5, mfc=(0.15, 0.35, 0.55, 0.8), mec="white", mew=0.4, label=role, zorder=3,
        )  # fmt: skip
        mean = sum(effects) / len(effects)
        axis.plot([mean, mean], [y - 0.44 * height, y + 0.44 * height], color="black", lw=1.6)
        beside = chance.get(role, {})
        said[-1] += f"\nn {beside.get('n', len(effects))}"
        said[-1] += f", p {beside['p']:.3f}" if beside else ""
    axis.set_yticks(ticks, said)
    axis.set_ylim(top - 0.1, 0.1)
    axis.set_xlabel(f"effect on {axis_name(metric, chosen)}", fontsize=TEXT)
    marks.bare(axis)
    axis.grid(visible=False, axis="y")
    notes = [f"solid line: the chosen cell{', with its interval' * banded}", "dashed: unsteered"]
    notes += ["a dot a null direction; black bar: their mean"] * bool(strips)
    marks.small_print(figure, notes)
    return marks.literal(figure)


def _spread(values: Sequence[float], bins: int = 48) -> list[float]:
    """Offsets from -1 to 1 that keep the dots of near-equal values apart."""
    low, high = min(values), max(values)
    step = (high - low) / bins or 1.0
    at = [int((v - low) / step) for v in values]
    tallest = max(4, *Counter(at).values())
    return [(2 * at[: i + 1].count(c) - at.count(c) - 1) / tallest for i, c in enumerate(at)]


def _evenly(keys: Sequence[Any], most: int, keep: Sequence[Any]) -> list[Any]:
    """`most` of a sequence, first and last among them, with `keep` in place of its neighbour."""
    at = [round(i * (len(keys) - 1) / max(1, most - 1)) for i in range(most)]
    for here in map(keys.index, keep):
        at[min(range(most), key=lambda i: abs(at[i] - here))] = here
    return [keys[i] for i in at]


def _apart(ticks: Sequence[float], inches: float = 2.4) -> tuple[list[float], list[str]]:
    """Of sorted ticks those whose names fit beside each other, first and last among them."""
    said = [marks.minus(f"{x:.3g}") for x in ticks]
    per = inches / ((ticks[-1] - ticks[0]) or 1.0)

    def fits(a: int, b: int) -> bool:
        return per * (ticks[b] - ticks[a]) > 0.0375 * (len(said[a]) + len(said[b])) + 0.06

    last, kept = len(ticks) - 1, [0]
    for i in range(1, last):
        if fits(kept[-1], i) and fits(i, last):
            kept.append(i)
    kept += [last] * (last > 0 and fits(kept[-1], last))
    return [ticks[i] for i in kept], [said[i] for i in kept]


def _point(record: Record, x: float, y: str) -> tuple[float, float, float, float]:
    return float(x), number(record[y]), number(record["low"]), number(record["high"])
