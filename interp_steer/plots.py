"""Plots, each a function from a table to a figure file. Colours differ in lightness as in hue, so
that they survive a grey print and colour-blind eyes.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from interp_steer.files import whole

MARKS = ("o-", "s--", "^-.", "D:")


def dose_response(
    table: pd.DataFrame,
    panels: dict[str, str],
    unsteered: dict[str, float],
    chosen: Sequence[tuple[str, float]],
    path: Path,
) -> Path:
    """Effect against dose: one panel a measure, the chosen cells ringed.

    Args:
        table: columns `line`, `dose` and the measures; one row for each (line, dose).
        panels: measure -> what its axis is called.
        unsteered: measure -> its value without steering, a dashed line.
        chosen: (line, dose) of each.
        path: a .png or .svg file, written whole or not at all.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    lines = list(dict.fromkeys(table["line"]))
    shades = plt.get_cmap("viridis")
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.8), sharex=True)
    for axis, (measure, label) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(lines):
            line = table[table["line"] == name].sort_values("dose")
            colour = shades(0.9 * i / max(1, len(lines) - 1))
            mark = MARKS[i % len(MARKS)]
            axis.plot(line["dose"], line[measure], mark, color=colour, ms=4, label=name)
        axis.axhline(unsteered[measure], color="grey", ls="--", lw=1.2, label="unsteered")
        for name, dose in chosen:
            here = table[(table["line"] == name) & (table["dose"] == dose)]
            axis.plot(here["dose"], here[measure], "o", ms=12, mfc="none", mec="crimson", mew=2)
        axis.set_xlabel("dose (coefficient / median residual norm)")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        top = max(table[measure].max(), unsteered[measure])
        axis.set_ylim(-0.04 * top, 1.08 * top)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = 4
    rows = -(-len(labels) // columns)
    # matplotlib fills a legend by columns; people read it by rows
    order = [i for c in range(columns) for i in range(c, len(labels), columns)]
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order],
        loc="upper center", ncols=columns, frameon=False, fontsize=9,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.065 * rows))
    with whole(path) as part:
        figure.savefig(part, format=path.suffix.lstrip(".") or "png", dpi=150)
    plt.close(figure)
    return path
