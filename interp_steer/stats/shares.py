"""Shares of an effect: a ratio of two means over prompts, with its interval.

A mean of per-prompt ratios is none: a prompt on which the effect is near 0 has a ratio of any size,
and it alone then decides the mean. So what is shared is summed over prompts before it is divided.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from interp_steer.errors import RequestError
from interp_steer.stats import intervals
from interp_steer.stats.interval import (
    MINIMUM,
    Interval,
    Values,
    check,
    check_paired,
    interval,
    seldom,
    student,
)
from interp_steer.stats.resampling import RESAMPLES, resamples, studentised

# Mean effects smaller than this, in nats, are the rounding of float32 logits: no share of them is
# taken.
NO_EFFECT = 1e-3


def ratio(
    part: Values, whole: Float[np.ndarray, " m"], level: float = 0.95, seed: int = 0
) -> Interval:
    """mean(part) / mean(whole), both of the same prompts, with an interval over prompts.

    The interval holds every ratio r at which mean(part - r whole) is not told from 0 (Fieller 1954,
    JRSS B 16, 175). It is told, as in `intervals.mean`, by the wider at each end of Student's t and
    the studentised bootstrap of part - r whole over whole prompts, r at its estimate. Where the
    mean of `whole` is not told from 0 itself, every ratio is possible: there is no interval.

    Args:
        part, whole: one value a prompt, the same prompts in the same order.
        level, seed: as in `intervals.mean`.

    Raises:
        RequestError: unequal numbers of values, values that are not finite, or a `whole` of mean 0.
    """
    check_paired(part, whole)
    check(np.stack([part, whole]), level)
    n, top, bottom = len(part), float(part.mean()), float(whole.mean())
    if bottom == 0:
        raise RequestError("the mean of the whole is 0: there is no share of it")
    estimate = top / bottom

    def told(limits: tuple[float, float] | None, method: str) -> Interval:
        return interval(estimate, limits, n, method, level)

    if n < MINIMUM:
        return told(None, "")
    apart = (part - estimate * whole) * math.copysign(1, bottom)
    size = max(float(np.abs(part).max()), float(np.abs(estimate * whole).max()), 1e-300)
    if seldom(np.round(apart / size, 9)[:, None], intervals.DIFFERING)[0]:
        return told(None, f"fewer than {intervals.DIFFERING} prompts differ from the rest")
    tail = (1 - level) / 2
    t = studentised(apart[:, None], resamples(n, seed, RESAMPLES))[0]
    below, above = np.quantile(t, [tail, 1 - tail])
    furthest = student(1 - tail, n) / math.sqrt(n)
    low = _root(part, whole, max(float(above), furthest))[0]
    high = _root(part, whole, max(-float(below), furthest))[1]
    if not math.isfinite(low) or not math.isfinite(high):
        return told(None, "the whole cannot be told from 0")
    return told((low, high), "Fieller's, with the studentised bootstrap over prompts")


def _root(part: Values, whole: Values, t: float) -> tuple[float, float]:
    """The two ratios r at which mean(part - r whole) is t standard deviations from 0; infinite
    where there are none.
    """
    top, bottom = float(part.mean()), float(whole.mean())
    (own, both), (_, other) = np.cov(part, whole)
    a = bottom**2 - t**2 * other
    half = top * bottom - t**2 * both
    c = top**2 - t**2 * own
    if a <= 0:
        return -math.inf, math.inf
    reach = math.sqrt(max(half**2 - a * c, 0.0))
    return (half - reach) / a, (half + reach) / a


def summarised(
    table: pd.DataFrame,
    by: Sequence[str],
    part: "pd.Series[float]",
    whole: "pd.Series[float]",
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Shares mean(part) / mean(whole) over items with intervals, a row for each setting of `by`.

    Args:
        table: has the columns of `by`, and `item`.
        part, whole: for each row of it what is shared, and the effect that it is a share of.

    Returns:
        The columns of `by`, then `estimate`, `low`, `high` (NaN where none can be told), `n`
        (items), `missing` (items without finite values, left out), `interval` (how it was formed,
        or why there is none), and the mean effect itself: `effect`, `effect_low`, `effect_high`.
    """
    rows: list[dict[str, object]] = []
    known: dict[bytes, Interval] = {}  # one effect is shared by many rows
    given = table.assign(_part=part, _whole=whole)
    for setting, some in given.groupby(list(by), sort=False, dropna=False):
        # one value an item: items that are given twice are no further evidence
        both = some.groupby("item", sort=False)[["_part", "_whole"]].mean().to_numpy(float)
        there = both[np.isfinite(both).all(1)]
        row: dict[str, object] = dict(zip(by, setting, strict=True))
        row |= dict.fromkeys(("estimate", "low", "high"), math.nan)
        row |= {"n": len(there), "missing": len(both) - len(there), "interval": "no values"}
        row |= dict.fromkeys(("effect", "effect_low", "effect_high"), math.nan)
        if len(there):
            top, bottom = np.ascontiguousarray(there.T)
            found = known.get(key := bottom.tobytes())
            if found is None:
                found = known[key] = intervals.mean(bottom, level=level, seed=seed)
            row |= {"effect": found.estimate, "effect_low": found.low, "effect_high": found.high}
            if abs(found.estimate) < NO_EFFECT:
                row["interval"] = "no effect"
            else:
                one = ratio(top, bottom, level, seed)
                row |= {"estimate": one.estimate, "low": one.low, "high": one.high}
                row["interval"] = one.method
        rows.append(row)
    numbers = ["estimate", "low", "high", "n", "missing", "interval"]
    numbers += ["effect", "effect_low", "effect_high"]
    out = pd.DataFrame(rows, columns=[*by, *numbers])
    return out.astype(dict.fromkeys(("low", "high", "effect_low", "effect_high"), float))


def doubt(summary: pd.DataFrame, what: str) -> str | None:
    """Why shares should not be believed: the effect that they are shares of is not told from 0.

    Args:
        summary: as `summarised` gives it; the row with most items speaks for all.
        what: names the effect.
    """
    if summary.empty or not summary["n"].max():
        return f"{what} has no values: there are no shares of it"
    row = max(summary.to_dict("records"), key=lambda one: int(one["n"]))
    size, low, high = (float(row[name]) for name in ("effect", "effect_low", "effect_high"))
    if abs(size) < NO_EFFECT:
        return f"{what} is {size:+.2g} nats, no more than rounding: there are no shares of it"
    if math.isnan(low):
        return (
            f"{what} is {size:+.3g} nats, and with {row['n']} prompts nothing tells it from 0: "
            f"shares are points without intervals (from {MINIMUM} prompts on there are some)"
            if row["n"] < MINIMUM
            else f"{what} is {size:+.3g} nats, and too few prompts differ to tell it from 0"
        )
    if low <= 0 <= high:
        return (
            f"{what} is {size:+.3g} nats [{low:+.3g}, {high:+.3g}] and cannot be told from 0: "
            "shares of it mean nothing"
        )
    return None
