"""How sure a number is, when the prompt is what was drawn.

Every interval is over prompts: all seeds of a prompt are averaged first (`by_unit`). Below
`MINIMUM` prompts there is only the point. `scripts/benchmarks/intervals.py` measures what is
promised. Every function raises RequestError without values, for one that is NaN or infinite, and
for a level that is no share.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from interp_steer.errors import RequestError
from interp_steer.stats.interval import (
    MINIMUM,
    Interval,
    Limits,
    Values,
    carried,
    check,
    check_kind,
    check_paired,
    interval,
    seldom,
    student,
    wilson,
)
from interp_steer.stats.resampling import RESAMPLES, resamples, studentised

# Where fewer prompts than this differ from the commonest value, their spread is a guess.
DIFFERING = 3

Arm = Float[np.ndarray, " n"] | Bool[np.ndarray, " n"]
Units = Sequence[str] | Sequence[int]


class Steerability(NamedTuple):
    """The mean slope over prompts, and the share of prompts whose slope is negative."""

    slope: Interval
    negative: Interval


def mean(
    values: Values,
    level: float = 0.95,
    seed: int = 0,
    bounds: Limits | None = None,
    kind: str = "mean",
) -> Interval:
    """The mean of one value a prompt, or of one paired difference a prompt.

    At each end the wider of the studentised bootstrap (Hall 1988; Efron and Tibshirani 1993, ch.
    12) and Student's t. The bootstrap alone covers skewed values but not heavy tails (92 % of t
    with 3 degrees of freedom), Student's t alone the reverse (86 % of lognormal values at n = 20);
    the wider of both costs 2 to 4 % of width on normal values. Lognormal values (sigma 1) are still
    covered 92 % at n = 20, 95 % at 50.

    Sometimes fewer than `DIFFERING` prompts differ from the commonest value. Then the sample does
    not tell how far other prompts may lie, and there is no interval. A rate is the exception: a
    success or a failure lies at a bound. If p is the share of prompts that differ, prompts that
    were not drawn may lie at the bounds, as many as Wilson's interval of p allows. So 20 zeros
    between -1 and 1 give [-0.16, 0.16], and 0/1 values give Wilson's interval. A share that is
    seldom above 0, such as that of repeated 3-grams, is no rate: it never comes near its bounds.

    Args:
        values: one a prompt.
        level: nominal coverage.
        seed: of the resampling; a seed gives the same interval every time.
        bounds: what no value can pass, (0, 1) for rates, (-1, 1) for their differences; the
            limits are cut there.
        kind: "mean"; or "rate": shares of successes, or their differences, which do lie at the
            bounds.

    Raises:
        RequestError: an unknown kind, a value that passes the bounds.
    """
    check_kind(kind)
    check(values, level, bounds)
    n, estimate = len(values), float(values.mean())
    if n < MINIMUM:
        return interval(estimate, None, n, "", level)
    if seldom(values[:, None], DIFFERING)[0]:
        return carried(values, level, bounds if kind == "rate" else None, DIFFERING)
    tail = (1 - level) / 2
    t = studentised(values[:, None], resamples(n, seed, RESAMPLES))[0]
    below, above = np.quantile(t, [tail, 1 - tail])
    furthest, spread = student(1 - tail, n) / math.sqrt(n), float(values.std(ddof=1))
    limits = estimate - spread * max(above, furthest), estimate - spread * min(below, -furthest)
    return interval(estimate, limits, n, "studentised bootstrap over prompts", level, bounds)


def rate(successes: Bool[np.ndarray, " n"], level: float = 0.95) -> Interval:
    """A rate over prompts with one answer each: Wilson's score interval (Wilson 1927).

    Its coverage averages 95 % over p and swings with p and n, as that of any interval of a count
    must (Brown, Cai and DasGupta 2001).
    """
    check(successes.astype(float), level)
    n, p = len(successes), float(successes.mean())
    return interval(p, wilson(p, n, level), n, "Wilson", level)


def by_unit(values: Values, units: Units) -> Float[np.ndarray, " units"]:
    """The mean of each prompt's values, all its seeds together.

    In the order of the sorted units, so that two arms over the same prompts are paired.

    Args:
        values: one a row.
        units: the prompt of each row, by name or number.

    Raises:
        RequestError: not one unit a value.
    """
    return _grouped(values, units)[0]


def rate_by_unit(successes: Bool[np.ndarray, " n"], units: Units, level: float = 0.95) -> Interval:
    """A rate over prompts with several answers (seeds) each; every prompt counts the same.

    Wilson's interval at the effective sample size p (1 - p) / variance of the estimate, never
    fewer than prompts or more than answers, with Student's quantile because that variance is
    estimated (Korn and Graubard 1998; Franco et al. 2019). Where fewer than `DIFFERING` prompts
    have a success, or a failure, the variance means nothing and the prompts are counted.

    Raises:
        RequestError: as `by_unit`.
    """
    shares, answers = _grouped(successes.astype(float), units)
    check(shares, level)
    n, p = len(shares), float(shares.mean())
    if answers.max() == 1:
        return rate(shares == 1, level)
    size, quantile = float(n), None
    if min((shares > 0).sum(), (shares < 1).sum()) >= DIFFERING and n >= MINIMUM:
        variance, most = float(shares.var(ddof=1)) / n, float(answers.sum())
        size = min(max(p * (1 - p) / variance, n), most) if variance > 0 else most
        quantile = student((1 + level) / 2, n)
    limits = wilson(p, size, level, quantile)
    return interval(p, limits, n, "Wilson at the effective sample size", level)


def difference(a: Arm, b: Arm, kind: str = "mean", level: float = 0.95, seed: int = 0) -> Interval:
    """a - b, paired over prompts.

    Args:
        a, b: one value a prompt, the same prompts in the same order.
        kind: "mean"; or "rate": shares of successes. Those of one answer a prompt take Newcombe's
            method 10 for paired differences (Newcombe 1998, Statistics in Medicine 17, 2635);
            those averaged over seeds take the mean of the differences, between -1 and 1.
        level, seed: as in `mean`.

    Raises:
        RequestError: an unknown kind, arms of unequal length, a rate outside [0, 1].
    """
    check_kind(kind)
    check_paired(a, b)
    a, b = a.astype(float), b.astype(float)
    if kind == "mean":
        return mean(a - b, level, seed)
    check(np.concatenate([a, b]), level, (0.0, 1.0))
    if not np.isin([a, b], (0, 1)).all():
        return mean(a - b, level, seed, (-1.0, 1.0), kind)
    n, p, q, both = len(a), float(a.mean()), float(b.mean()), float((a * b).mean())
    (p_low, p_high), (q_low, q_high) = wilson(p, n, level), wilson(q, n, level)
    # the correlation of the two rates; a positive one is corrected for continuity
    together, scale = both - p * q, math.sqrt(p * (1 - p) * q * (1 - q))
    together = max(together - 0.5 / n, 0.0) if together > 0 else together
    phi = together / scale if scale > 0 else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * phi * one * other + other**2, 0.0))

    limits = p - q - reach(p - p_low, q_high - q), p - q + reach(p_high - p, q - q_low)
    return interval(p - q, limits, n, "paired Newcombe", level, (-1.0, 1.0))


def slopes(x: Float[np.ndarray, " k"], y: Float[np.ndarray, "n k"]) -> Values:
    """Least-squares slope of each prompt's y against x, in units of y per unit of x.

    With propensities log p(y+) - log p(y-) against multipliers this is the steerability of Tan et
    al. 2024 (arXiv 2407.12404).

    Raises:
        RequestError: x does not vary.
    """
    check(x)
    check(y)
    if not np.ptp(x):
        raise RequestError("a slope needs at least two different multipliers")
    centred = x - x.mean()
    return np.asarray((y - y.mean(1, keepdims=True)) @ centred / (centred @ centred))


def steerability(
    x: Float[np.ndarray, " k"], y: Float[np.ndarray, "n k"], level: float = 0.95, seed: int = 0
) -> Steerability:
    """The mean of `slopes` over prompts, and Wilson's interval of the share that is negative."""
    each = slopes(x, y)
    return Steerability(mean(each, level, seed), rate(each < 0, level))


def _grouped(
    values: Values, units: Units
) -> tuple[Float[np.ndarray, " units"], Float[np.ndarray, " units"]]:
    """Mean and number of each unit's values, by sorted unit."""
    check(values)
    if len(units) != len(values):
        raise RequestError(f"{len(values)} values of {len(units)} units: expected one unit a value")
    which = np.unique(np.asarray(units), return_inverse=True)[1]
    counts = np.bincount(which).astype(float)
    return np.bincount(which, weights=values) / counts, counts
