"""What lines of a sweep do to every prompt, beside the unsteered answers."""

from collections.abc import Sequence

import pandas as pd

from interp_steer.errors import RunError
from interp_steer.study import metrics as measures

BEFORE = "{} unsteered"  # the column of a metric's unsteered values


def by_line(
    table: pd.DataFrame, lines: Sequence[str], metrics: Sequence[str]
) -> dict[str, pd.DataFrame]:
    """Line -> the metrics of every prompt (seeds averaged), and their unsteered values.

    Args:
        table: of a run of `Study.sweep(lines, ...)` that chooses nothing.

    Raises:
        RunError: the run has another number of lines.
    """
    names = list(metrics)
    before = table[table["role"] == "unsteered"].groupby("item")[names].mean()
    before = before.rename(columns=BEFORE.format)
    parts = [part for _, part in table[table["role"] != "unsteered"].groupby("steer", sort=False)]
    if len(parts) != len(lines):
        raise RunError(f"{len(lines)} lines were run, and {len(parts)} are in the rows")
    means = [part.groupby("item")[names].mean().join(before) for part in parts]
    return dict(zip(lines, means, strict=True))


def effect(values: pd.DataFrame, metric: str) -> float:
    """Mean difference from unsteered, positive where it is better; what is missing has no effect.

    It is rounded, so that equal sums in another order are equal.
    """
    moved = values[metric] - values[BEFORE.format(metric)]
    return round(float((measures.find(metric).sign * moved).fillna(0.0).mean()), 9)
