"""Plots, each a function from a table to a figure file. Colours differ in lightness as in hue, so
that they survive a grey print and colour-blind eyes.
"""

from pathlib import Path

import pandas as pd

from interp_steer.files import whole


def dose_response(
    table: pd.DataFrame,
    panels: dict[str, str],
    unsteered: dict[str, float],
    chosen: tuple[int, float],
    path: Path,
) -> Path:
    """Effect against dose: one panel a measure, one line a layer, the chosen cell ringed.

    Args:
        table: columns `layer`, `dose` and the measures; one line for each (layer, dose).
        panels: measure -> what its axis is called.
        unsteered: measure -> its value without steering, a dashed line.
        chosen: (layer, dose).
        path: a .png or .svg file, written whole or not at all.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    layers = sorted(table["layer"].unique())
    shades = plt.get_cmap("viridis")
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.3), sharex=True)
    for axis, (measure, label) in zip(axes, panels.items(), strict=True):
        for i, layer in enumerate(layers):
            line = table[table["layer"] == layer].sort_values("dose")
            colour = shades(0.85 * i / max(1, len(layers) - 1))
            axis.plot(line["dose"], line[measure], "o-", color=colour, ms=4, label=f"block {layer}")
        axis.axhline(unsteered[measure], color="grey", ls="--", lw=1.2, label="unsteered")
        here = table[(table["layer"] == chosen[0]) & (table["dose"] == chosen[1])]
        axis.plot(here["dose"], here[measure], "o", ms=12, mfc="none", mec="crimson", mew=2)
        axis.set_xlabel("dose (coefficient / median residual norm)")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        top = max(table[measure].max(), unsteered[measure])
        axis.set_ylim(-0.04 * top, 1.08 * top)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    with whole(path) as part:
        figure.savefig(part, format=path.suffix.lstrip(".") or "png", dpi=150)
    plt.close(figure)
    return path
