"""Effect against damage: which settings give the most for what they cost."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from interp_steer.errors import RequestError
from interp_steer.report import marks
from interp_steer.report.findings import setting_text
from interp_steer.report.marks import RED, SMALL, TEXT, Record, axis_name
from interp_steer.report.page import as_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COSTS = ("kl_mean", "loss", "surprise", "kl_last")
"""What counts as damage, the first that a run has."""
NAMED = 6  # settings of the front that are named


def cost_of(grid: pd.DataFrame, metric: str) -> str:
    """The damage that a grid's effects on a metric can be set against.

    Raises:
        RequestError: the run measured none.
    """
    there = set(grid["metric"]) if len(grid) else set()
    for cost in COSTS:
        if cost in there and cost != metric:
            return cost
    raise RequestError(f"no damage was measured beside {metric}: none of {', '.join(COSTS)}")


def front(costs: Sequence[float], effects: Sequence[float]) -> list[int]:
    """The Pareto front, cheapest first: settings that no other matches at less damage, or beats at
    as little.
    """
    order = sorted(range(len(costs)), key=lambda n: (costs[n], -effects[n]))
    found: list[int] = []
    for n in order:
        if not found or effects[n] > effects[found[-1]]:
            found.append(n)
    return found


def against_damage(
    grid: pd.DataFrame, metric: str, chosen: Record | None = None, sign: float = 1.0
) -> "Figure":
    """Every setting's effect on a metric against its damage, with the Pareto front.

    Args:
        grid: `Findings.grid`.
        metric: whose effect is wanted.
        chosen: the setting of the chosen cell, which is ringed.
        sign: -1 for a metric of which less is better.

    Raises:
        RequestError: the grid has no such metric, no damage beside it, or fewer than three settings
            with both.
    """
    from matplotlib.figure import Figure

    cost = cost_of(grid, metric)
    wanted = {r["cell"]: r for r in as_records(grid) if r["metric"] == metric}
    paid = {r["cell"]: r for r in as_records(grid) if r["metric"] == cost}
    both = [
        (wanted[cell], paid[cell])
        for cell in wanted
        if cell in paid and pd.notna(wanted[cell]["effect"]) and pd.notna(paid[cell]["effect"])
    ]
    if len(both) < 3:
        raise RequestError(f"fewer than three settings have {metric} and {cost}")
    x = [float(p["effect"]) for _, p in both]
    y = [float(w["effect"]) for w, _ in both]
    best = front(x, [sign * value for value in y])
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color="0.35", ls=(0, (6, 3)), lw=1.1)
    for (w, _), at in zip(both, x, strict=True):
        if pd.notna(w["low"]):
            axis.plot([at, at], [w["low"], w["high"]], color="0.75", lw=1, zorder=1)
    axis.plot(x, y, "o", color="0.45", ms=4.5, zorder=2, label="_settings")
    axis.plot([x[n] for n in best], [y[n] for n in best], "D-", color=RED, ms=5.5, lw=1.4, zorder=3,
              label="_front")  # fmt: skip
    for rank, n in enumerate(best[-NAMED:]):
        setting = both[n][0]
        text = setting_text({k: str(setting[k]) for k in ("direction", "operator", "site", "level",
                                                          "scope")})  # fmt: skip
        short = f"{setting['site'].removeprefix('resid_post ')}, {setting['level']}"
        axis.annotate(
            short if setting["operator"] else text[:28], (x[n], y[n]), fontsize=SMALL - 1,
            xytext=(4, 5 if rank % 2 == 0 else -11), textcoords="offset points",
        )  # fmt: skip
        if chosen and text == setting_text({k: str(v) for k, v in chosen.items()}):
            axis.plot([x[n]], [y[n]], "o", ms=12, mfc="none", mec=RED, mew=2, zorder=4)
    axis.set_xlabel(f"damage: change of {axis_name(cost, both[0][1])}", fontsize=TEXT)
    axis.set_ylabel(f"effect on {axis_name(metric, both[0][0])}", fontsize=TEXT)
    marks.bare(axis)
    notes = ["red: the Pareto front, no setting does more for less"]
    notes += ["grey lines: intervals that hold for the whole grid"] * bool(
        any(pd.notna(w["low"]) for w, _ in both)
    )
    marks.small_print(figure, notes)
    return marks.literal(figure)
