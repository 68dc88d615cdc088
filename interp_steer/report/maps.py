"""Pictures of patching and tracing: position x layer, head x layer, or a profile over layers.

The picture of causal tracing is a heat map of position x layer: Meng et al. 2022 (arXiv 2202.05262,
figure 1). Colours and files as in `marks`.
"""

import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp_steer.errors import RequestError
from interp_steer.report import marks, plots
from interp_steer.report.marks import SHADES, SMALL, TEXT
from interp_steer.report.page import as_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BROUGHT_BACK = "share of the {} brought back"
GONE = "share of the effect on {} that goes"
MOVED = {
    "last": "|x steered − x| at the last position",
    "steered": "|x steered − x|, mean of steered positions",
    "all": "|x steered − x|, mean of positions",
    "last_relative": "|x steered − x| / median |x|, last position",
    "steered_relative": "|x steered − x| / median |x|, mean of steered positions",
    "all_relative": "|x steered − x| / median |x|, mean of positions",
    "kl": "KL of the logit lens, last position (nats)",
}


def patching(summary: pd.DataFrame, table: pd.DataFrame | None = None, most: int = 6) -> "Figure":
    """What each place brings back: position x layer, head x layer, or a profile over layers.

    Args:
        summary: of a `patching.Patching`.
        table: its table, which names the tokens.
        most: panels, those with the largest shares; the figure says if there were more.

    Raises:
        RequestError: there is no share to draw.
    """
    rows = [r for r in as_records(summary) if pd.notna(r["estimate"])]
    if not rows:
        raise RequestError("no place has a share to draw")
    label = BROUGHT_BACK.format(_plain(rows[0]["score"]))
    across = "position" if len({str(r["position"]) for r in rows}) > 1 else "head"
    if across == "head" and all(pd.isna(r["head"]) for r in rows):
        return plots.profile(summary, label=label)
    panels: dict[str, list[dict[str, Any]]] = {}
    for r in rows:
        if pd.notna(r[across]):
            head = f", head {r['head']}" if across == "position" and pd.notna(r["head"]) else ""
            panels.setdefault(f"{r['component']}{head}", []).append(r)
    shown = {r["component"] for some in panels.values() for r in some}
    largest = sorted(panels, key=lambda name: -max(abs(r["estimate"]) for r in panels[name]))
    kept = [name for name in panels if name in largest[:most]]
    tokens = _tokens(table) if table is not None and across == "position" else {}
    drawn = [_Panel(name, across, panels[name]) for name in kept]
    left_out, headless = len(panels) - len(kept), {r["component"] for r in rows} - shown
    notes = [f"{left_out} panels with smaller shares left out"] * bool(left_out)
    notes += [f"{', '.join(sorted(headless))}: no heads, not drawn"] * bool(headless)
    return marks.literal(_maps(drawn, tokens, label, "; ".join(notes)))


def mediation(summary: pd.DataFrame) -> "Figure":
    """The share of the effect that goes with each part, over layers.

    Args:
        summary: of a `tracing.Mediation`.
    """
    score = str(summary["score"].iloc[0]) if len(summary) else ""
    return plots.profile(summary, label=GONE.format(_plain(score)))


def propagation(summary: pd.DataFrame) -> "Figure":
    """How far steering moves the stream, over layers.

    Args:
        summary: of a `tracing.Propagation`.
    """
    score = str(summary["score"].iloc[0]) if len(summary) else ""
    return plots.profile(summary, label=MOVED.get(score, score))


def _plain(score: object) -> str:
    return str(score).replace("_", " ")


def _tokens(table: pd.DataFrame) -> dict[int, str]:
    """The clean prompts' token at each position; of several the first, and a mark."""
    named: dict[int, str] = {}
    for position, some in table.groupby("position"):
        seen = [str(token) for token in dict.fromkeys(some["token"])]
        first = seen[0].strip() or repr(seen[0])[1:-1]
        named[int(str(position))] = textwrap.shorten(first, 14) + " …" * (len(seen) > 1)
    return named


@dataclass(frozen=True)
class _Panel:
    """One map: shares over layers (up) and positions or heads (across)."""

    name: str
    across: str
    rows: Sequence[dict[str, Any]]

    def values(self, key: str) -> list[int]:
        """The layers, positions or heads that occur; positions from the end come last."""
        return sorted({int(r[key]) for r in self.rows}, key=lambda n: (n < 0, n))

    @property
    def grid(self) -> np.ndarray:
        layers, columns = self.values("layer"), self.values(self.across)
        grid = np.full((len(layers), len(columns)), np.nan)
        for r in self.rows:
            grid[layers.index(r["layer"]), columns.index(r[self.across])] = r["estimate"]
        return grid


def _maps(panels: Sequence[_Panel], tokens: dict[int, str], label: str, note: str) -> "Figure":
    from matplotlib.figure import Figure

    wide = max(1.6, 0.22 * max(panel.grid.shape[1] for panel in panels)) + 0.8
    tall = max(1.6, 0.11 * max(panel.grid.shape[0] for panel in panels)) + 1.2
    across = max(1, min(len(panels), int(9.5 / wide)))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(across * wide + 0.9, down * tall), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    known = [v for panel in panels for v in panel.grid.flat if v == v]
    top = max(map(abs, known)) or 1.0  # few places that bring all back are what is looked for
    # shares are seldom below 0: a scale centred there would leave half its colours unused
    low = min(0.0, *known) if min(known) > -0.2 * top else -top
    for axis, panel in itertools.zip_longest(axes, panels):
        if panel is None:
            axis.set_axis_off()
        else:
            image = _map(axis, panel, tokens, (low, top))
    marks.colour_bar(figure, image, axes, down * tall, textwrap.fill(label, 34))
    marks.small_print(figure, [note] if note else [])
    return figure


def _map(axis: "Axes", panel: _Panel, tokens: dict[int, str], ends: tuple[float, float]) -> Any:
    from matplotlib import colormaps

    layers, columns = panel.values("layer"), panel.values(panel.across)
    image = axis.imshow(
        np.ma.masked_invalid(panel.grid), cmap=colormaps[SHADES], vmin=ends[0], vmax=ends[1],
        aspect="auto", origin="lower", interpolation="nearest",
    )  # fmt: skip
    names = [f"{tokens[c]}  {c}" if c in tokens else str(c) for c in columns]
    step = math.ceil(len(columns) / 40)
    at = range(0, len(columns), step)
    axis.set_xticks(list(at), [marks.minus(names[i]) for i in at], rotation=90 if tokens else 0)
    step = math.ceil(len(layers) / 12)
    axis.set_yticks(range(0, len(layers), step), [str(n) for n in layers[::step]])
    axis.tick_params(labelsize=SMALL, length=2)
    axis.set_xlabel(panel.across, fontsize=TEXT)
    axis.set_ylabel("layer", fontsize=TEXT)
    axis.set_title(panel.name, fontsize=TEXT, loc="left")
    return image
