"""Many cells at once, over the same prompts: bands that hold together, and the set of the best."""

import math
from dataclasses import replace

import numpy as np

from interp_steer.stats.interval import (
    MINIMUM,
    Cells,
    Interval,
    Limits,
    carried,
    check,
    check_kind,
    interval,
    seldom,
    student,
)
from interp_steer.stats.resampling import RESAMPLES, multivariate, resamples, studentised, sums

# Where fewer prompts than this differ from the commonest value, their spread is a guess. The
# further out the quantile, the more are needed: of many cells' largest t, and of all pairs of cells
# (where 9 differences of one sign are not yet rare). Measured on rates near 0.
DIFFERING_IN_BANDS, DIFFERING_IN_SETS = 5, 10
RESAMPLES_OF_A_SET = 2_000


def bands(
    values: Cells,
    level: float = 0.95,
    seed: int = 0,
    bounds: Limits | None = None,
    kind: str = "mean",
) -> list[Interval]:
    """Intervals of every cell's mean that hold all together, over the same prompts.

    Studentised bootstrap of the largest and the smallest t over the cells (max-t; Westfall and
    Young 1993; Romano and Wolf 2005), whole prompts resampled, so that cells keep their
    correlation. A cell in which fewer than `DIFFERING_IN_BANDS` prompts differ from its commonest
    value has no interval, or of rates with `bounds` that of `mean` at Bonferroni's level, and does
    not widen the others.

    Args:
        values: one a prompt and cell.
        level, seed, bounds, kind: as in `mean`.

    Raises:
        RequestError: as `mean`.
    """
    check_kind(kind)
    check(values, level, bounds)
    n, cells = values.shape
    centre, spread = values.mean(0), values.std(0, ddof=1) if n > 1 else np.zeros(cells)
    if n < MINIMUM:
        return [interval(float(one), None, n, "", level) for one in centre]
    rare, weights = seldom(values, DIFFERING_IN_BANDS), resamples(n, seed, RESAMPLES)
    least, most = np.zeros((2, weights.shape[1]))
    for some in np.array_split(values[:, ~rare], cells // 8 + 1, axis=1):  # fits in the cache
        t = studentised(some, weights)
        least, most = np.minimum(least, t.min(0, initial=0)), np.maximum(most, t.max(0, initial=0))
    tail = (1 - level) / 2
    low = centre - spread * np.quantile(most, 1 - tail)
    high = centre - spread * np.quantile(least, tail)
    method, each = "simultaneous studentised bootstrap over prompts", 1 - (1 - level) / cells
    found = []
    for cell in range(cells):
        if rare[cell]:
            ends = bounds if kind == "rate" else None
            one = carried(values[:, cell], each, ends, DIFFERING_IN_BANDS)
            found.append(replace(one, method=f"simultaneous: {one.method}", level=level))
        else:
            limits = float(low[cell]), float(high[cell])
            found.append(interval(float(centre[cell]), limits, n, method, level, bounds))
    return found


def best_set(values: Cells, level: float = 0.95, seed: int = 0) -> list[int]:
    """The cells that cannot be excluded from having the largest mean, over the same prompts.

    Multiple comparisons with the best (Hsu 1984): a cell is excluded if another one beats it by
    more than the critical value of the largest t of all others against it, so that the best cell
    is in the set with probability `level`. The critical value is the larger of the studentised
    bootstrap's and of multivariate t's with the same correlation (Dunnett 1955). Pairs of cells
    that differ in fewer than `DIFFERING_IN_SETS` prompts exclude nothing; below `MINIMUM` prompts
    every cell is in the set.

    Args:
        values: one a prompt and cell, larger is better.
        level, seed: as in `mean`.
    """
    check(values, level)
    n, cells = values.shape
    if n < MINIMUM:
        return list(range(cells))
    one = student(level, n) / math.sqrt(n)  # no critical value of several t is smaller
    found = []
    for cell in range(cells):
        ahead = np.delete(values, cell, axis=1) - values[:, [cell]]
        ahead = ahead[:, ~seldom(ahead, min(DIFFERING_IN_SETS, n - 1))]
        centre, spread = ahead.mean(0), ahead.std(0, ddof=1)
        largest = (centre / spread).max(initial=-math.inf)
        if largest > one:
            t = sums((ahead - centre) / spread, multivariate(n, seed, RESAMPLES_OF_A_SET))
            if largest > np.quantile(t.max(0), level):
                t = studentised(ahead, resamples(n, seed, RESAMPLES_OF_A_SET))
                if largest > np.quantile(t.max(0), level):
                    continue
        found.append(cell)
    return found
