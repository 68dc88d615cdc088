"""How sure a number is, when the prompt is what was drawn.

Every interval is over prompts: all seeds of a prompt are averaged first (`by_unit`). Below
`MINIMUM` prompts only the point is told. `scripts/benchmarks/intervals.py` measures how often
the intervals hold the truth. Every function raises RequestError without values, for one that is
NaN or infinite, and for a level that is no share.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from interp_steer.errors import RequestError, nearest

MINIMUM = 10  # prompts; no interval that was measured below it covers what it says
KINDS = ("mean", "rate")

# Where fewer prompts than this differ from the commonest value, their spread is a guess. The
# further out the quantile, the more are needed: of one mean, of many cells' largest t, of all pairs
# of cells (where 9 differences of one sign are not yet rare). Measured on rates near 0.
DIFFERING, DIFFERING_IN_BANDS, DIFFERING_IN_SETS = 3, 5, 10
# The sample's variance counts as half a prompt in each resample's: without it t explodes where few
# prompts differ, and the bands of skewed values are wider than they need to be.
PRIOR = 0.5
RESAMPLES, RESAMPLES_OF_A_SET, SIGN_FLIPS = 10_000, 2_000, 9_999

Values = Float[np.ndarray, " n"]
Arm = Float[np.ndarray, " n"] | Bool[np.ndarray, " n"]
Cells = Float[np.ndarray, "n cells"]
Units = Sequence[str] | Sequence[int]
Limits = tuple[float, float]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        estimate: the point, in the units of the values.
        low, high: the limits; None where none can be told.
        n: prompts.
        method: how the limits were found, or why there are none.
        level: nominal coverage.
    """

    estimate: float
    low: float | None
    high: float | None
    n: int
    method: str
    level: float = 0.95

    def excludes(self, value: float = 0.0) -> bool:
        """Whether a value lies outside; False without limits."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            why = f"n = {self.n}" + (f", {self.method}" if self.n >= MINIMUM else "")
            return f"{_digits(self.estimate, self.estimate)} ({why}: no interval)"
        point, low, high = (
            _digits(one, self.high - self.low) for one in (self.estimate, self.low, self.high)
        )
        return f"{point} [{low}, {high}]"

    def as_json(self) -> dict[str, float | int | str | None]:
        """As a program reads it."""
        return asdict(self)


class Missing(NamedTuple):
    """A score without its missing values, how many there are, and the score with each of them 0."""

    interval: Interval
    n_missing: int
    with_zero: float


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

    Where fewer than `DIFFERING` prompts differ from the commonest value, all equal included,
    nothing tells how far the unseen ones lie, and there is no interval. Of rates it is known: a
    success or a failure lies at a bound. Then, if a share p of prompts differs, with Wilson's
    interval of p, the unseen ones may lie there: 20 equal zeros between -1 and 1 give
    [-0.16, 0.16], and 0/1 values Wilson's interval. A share that is seldom above 0, such as that of
    repeated 3-grams, is no rate: its bounds are far from all that it ever is, and limits that
    reach for them say nothing of it.

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
    _check_kind(kind)
    _check(values, level, bounds)
    n, estimate = len(values), float(values.mean())
    if n < MINIMUM:
        return _interval(estimate, None, n, "", level)
    if _seldom(values[:, None], DIFFERING)[0]:
        return _carried(values, level, bounds if kind == "rate" else None, DIFFERING)
    tail = (1 - level) / 2
    t = _studentised(values[:, None], _resamples(n, seed, RESAMPLES))[0]
    below, above = np.quantile(t, [tail, 1 - tail])
    student, spread = _student(1 - tail, n) / math.sqrt(n), float(values.std(ddof=1))
    limits = estimate - spread * max(above, student), estimate - spread * min(below, -student)
    return _interval(estimate, limits, n, "studentised bootstrap over prompts", level, bounds)


def rate(successes: Bool[np.ndarray, " n"], level: float = 0.95) -> Interval:
    """A rate over prompts with one answer each: Wilson's score interval (Wilson 1927).

    Its coverage averages 95 % over p and swings with p and n, as that of any interval of a count
    must (Brown, Cai and DasGupta 2001).
    """
    _check(successes.astype(float), level)
    n, p = len(successes), float(successes.mean())
    return _interval(p, _wilson(p, n, level), n, "Wilson", level)


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
    _check(shares, level)
    n, p = len(shares), float(shares.mean())
    if answers.max() == 1:
        return rate(shares == 1, level)
    size, quantile = float(n), None
    if min((shares > 0).sum(), (shares < 1).sum()) >= DIFFERING and n >= MINIMUM:
        variance, most = float(shares.var(ddof=1)) / n, float(answers.sum())
        size = min(max(p * (1 - p) / variance, n), most) if variance > 0 else most
        quantile = _student((1 + level) / 2, n)
    limits = _wilson(p, size, level, quantile)
    return _interval(p, limits, n, "Wilson at the effective sample size", level)


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
    _check_kind(kind)
    _check_paired(a, b)
    a, b = a.astype(float), b.astype(float)
    if kind == "mean":
        return mean(a - b, level, seed)
    _check(np.concatenate([a, b]), level, (0.0, 1.0))
    if not np.isin([a, b], (0, 1)).all():
        return mean(a - b, level, seed, (-1.0, 1.0), kind)
    n, p, q, both = len(a), float(a.mean()), float(b.mean()), float((a * b).mean())
    (p_low, p_high), (q_low, q_high) = _wilson(p, n, level), _wilson(q, n, level)
    # the correlation of the two rates; a positive one is corrected for continuity
    together, scale = both - p * q, math.sqrt(p * (1 - p) * q * (1 - q))
    together = max(together - 0.5 / n, 0.0) if together > 0 else together
    phi = together / scale if scale > 0 else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * phi * one * other + other**2, 0.0))

    limits = p - q - reach(p - p_low, q_high - q), p - q + reach(p_high - p, q - q_low)
    return _interval(p - q, limits, n, "paired Newcombe", level, (-1.0, 1.0))


def exact_p(a: Bool[np.ndarray, " n"], b: Bool[np.ndarray, " n"]) -> float:
    """McNemar's exact test that two paired rates are equal, two-sided (McNemar 1947).

    Raises:
        RequestError: arms of unequal length.
    """
    from scipy import special

    _check_paired(a, b)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return min(1.0, 2 * float(special.bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def permutation_p(a: Values, b: Values, seed: int = 0) -> float:
    """Two-sided sign-flip test of the mean of a - b, paired over prompts (Fisher 1935).

    Exact where at most 12 differences are not zero (zeros have no sign); else over `SIGN_FLIPS`
    random flips, the observed one counted too.

    Raises:
        RequestError: arms of unequal length.
    """
    _check_paired(a, b)
    _check(a - b)
    apart = (a - b)[a != b]
    # sums in another order round differently
    k, observed = len(apart), float(abs(apart.sum()) - 1e-9 * np.abs(apart).sum())
    if k <= 12:
        signs = 1 - 2 * (np.arange(2**k)[:, None] >> np.arange(k) & 1)
        return float((np.abs(signs @ apart) >= observed).mean())
    signs = 1 - 2 * np.random.default_rng(seed).integers(0, 2, (SIGN_FLIPS, k), dtype=np.int8)
    return p_null(observed, np.abs(signs @ apart))


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
    _check_kind(kind)
    _check(values, level, bounds)
    n, cells = values.shape
    centre, spread = values.mean(0), values.std(0, ddof=1) if n > 1 else np.zeros(cells)
    if n < MINIMUM:
        return [_interval(float(one), None, n, "", level) for one in centre]
    seldom, weights = _seldom(values, DIFFERING_IN_BANDS), _resamples(n, seed, RESAMPLES)
    least, most = np.zeros((2, weights.shape[1]))
    for some in np.array_split(values[:, ~seldom], cells // 8 + 1, axis=1):  # fits in the cache
        t = _studentised(some, weights)
        least, most = np.minimum(least, t.min(0, initial=0)), np.maximum(most, t.max(0, initial=0))
    tail = (1 - level) / 2
    low = centre - spread * np.quantile(most, 1 - tail)
    high = centre - spread * np.quantile(least, tail)
    method, each = "simultaneous studentised bootstrap over prompts", 1 - (1 - level) / cells
    found = []
    for cell in range(cells):
        if seldom[cell]:
            ends = bounds if kind == "rate" else None
            one = _carried(values[:, cell], each, ends, DIFFERING_IN_BANDS)
            found.append(replace(one, method=f"simultaneous: {one.method}", level=level))
        else:
            limits = float(low[cell]), float(high[cell])
            found.append(_interval(float(centre[cell]), limits, n, method, level, bounds))
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
    _check(values, level)
    n, cells = values.shape
    if n < MINIMUM:
        return list(range(cells))
    one = _student(level, n) / math.sqrt(n)  # no critical value of several t is smaller
    found = []
    for cell in range(cells):
        ahead = np.delete(values, cell, axis=1) - values[:, [cell]]
        ahead = ahead[:, ~_seldom(ahead, min(DIFFERING_IN_SETS, n - 1))]
        centre, spread = ahead.mean(0), ahead.std(0, ddof=1)
        largest = (centre / spread).max(initial=-math.inf)
        if largest > one:
            t = _sums((ahead - centre) / spread, _multivariate(n, seed, RESAMPLES_OF_A_SET))
            if largest > np.quantile(t.max(0), level):
                t = _studentised(ahead, _resamples(n, seed, RESAMPLES_OF_A_SET))
                if largest > np.quantile(t.max(0), level):
                    continue
        found.append(cell)
    return found


def p_null(observed: float, nulls: Float[np.ndarray, " k"]) -> float:
    """How often a control reaches what was observed: (1 + #null >= observed) / (1 + #null).

    One-sided, larger is more (Davison and Hinkley 1997, 4.2).
    """
    _check(nulls)
    _check(np.array([observed]))
    # equal effects that were summed in another order differ in their last bits
    slack = 1e-9 * max(abs(observed), 1e-9)
    return float(1 + (nulls >= observed - slack).sum()) / (1 + len(nulls))


def missing(
    values: Sequence[float | None], kind: str = "mean", level: float = 0.95, seed: int = 0
) -> Missing:
    """One score a prompt where some could not be had, which is neither zero nor random.

    Args:
        values: the scores, None or NaN where missing; never negative, so that the score with each
            missing one as 0 is its lower bound.
        kind: "mean", or "rate" where every score is 0 or 1.
        level, seed: as in `mean`.

    Raises:
        RequestError: an unknown kind, all missing, a negative score, a rate not of 0 and 1.
    """
    _check_kind(kind)
    scores = np.array([math.nan if one is None else one for one in values], dtype=float)
    there = scores[~np.isnan(scores)]
    if len(scores) and not len(there):
        raise RequestError("every value is missing")
    if (there < 0).any():
        raise RequestError("a score is negative: counted as 0, the missing give no lower bound")
    if kind == "rate" and not np.isin(there, (0, 1)).all():
        raise RequestError("a rate is of values that are 0 or 1")
    interval = rate(there == 1, level) if kind == "rate" else mean(there, level, seed)
    return Missing(interval, len(scores) - len(there), float(there.sum()) / len(scores))


def slopes(x: Float[np.ndarray, " k"], y: Float[np.ndarray, "n k"]) -> Values:
    """Least-squares slope of each prompt's y against x, in units of y per unit of x.

    With propensities log p(y+) - log p(y-) against multipliers this is the steerability of Tan et
    al. 2024 (arXiv 2407.12404).

    Raises:
        RequestError: x does not vary.
    """
    _check(x)
    _check(y)
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


def _check(
    values: Float[np.ndarray, "..."], level: float = 0.95, bounds: Limits | None = None
) -> None:
    if not values.size:
        raise RequestError("there are no values")
    if not np.isfinite(values).all():
        raise RequestError("a value is NaN or infinite; what is missing is for missing() to count")
    if not 0 < level < 1:
        raise RequestError(f"level is {level}, expected a share between 0 and 1")
    if bounds and not bounds[0] <= values.min() <= values.max() <= bounds[1]:
        raise RequestError(f"a value is outside its bounds {bounds[0]:g} and {bounds[1]:g}")


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise RequestError(f"unknown kind {kind!r}{nearest(kind, KINDS)}")


def _check_paired(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise RequestError(f"{len(a)} and {len(b)} prompts are not paired")


def _digits(value: float, width: float) -> str:
    """A value to two digits of a width."""
    places = 1 - math.floor(math.log10(abs(width))) if width else 2
    return f"{value:.{min(max(places, 0), 9)}f}"


def _interval(
    estimate: float,
    limits: Limits | None,
    n: int,
    method: str,
    level: float,
    bounds: Limits | None = None,
) -> Interval:
    """An interval cut at its bounds; the point alone below `MINIMUM` prompts."""
    if n < MINIMUM:
        return Interval(estimate, None, None, n, f"fewer than {MINIMUM} prompts", level)
    low, high = limits or (None, None)
    if bounds and low is not None and high is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Interval(estimate, low, high, n, method, level)


def _grouped(
    values: Values, units: Units
) -> tuple[Float[np.ndarray, " units"], Float[np.ndarray, " units"]]:
    """Mean and number of each unit's values, by sorted unit."""
    _check(values)
    if len(units) != len(values):
        raise RequestError(f"{len(values)} values of {len(units)} units: expected one unit a value")
    which = np.unique(np.asarray(units), return_inverse=True)[1]
    counts = np.bincount(which).astype(float)
    return np.bincount(which, weights=values) / counts, counts


def _student(share: float, n: int) -> float:
    from scipy import special

    return float(special.stdtrit(n - 1, share))


def _wilson(p: float, n: float, level: float, quantile: float | None = None) -> Limits:
    """Limits of a rate p of n, with the normal quantile unless another is given."""
    from scipy import special

    z2 = (quantile or float(special.ndtri((1 + level) / 2))) ** 2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    # at 0 and 1 the limit is the rate itself, which rounding may miss
    return (0.0 if p == 0 else centre - half), (1.0 if p == 1 else centre + half)


def _seldom(values: Cells, fewest: int) -> Bool[np.ndarray, " cells"]:
    """Cells in which fewer than `fewest` prompts differ from the commonest value."""
    order = np.sort(_snapped(values), axis=0)
    return np.asarray((order[:fewest] == order[-fewest:]).any(0))


def _snapped(values: Cells) -> Cells:
    """Rounded to 9 digits of each cell's largest: differences of equal shares differ in bits."""
    scale = np.abs(values).max(0)
    scale = np.where(scale > 0, scale, 1.0)
    return np.asarray(np.round(values / scale, 9) * scale)


def _carried(values: Values, level: float, bounds: Limits | None, fewest: int) -> Interval:
    """Where few prompts differ: the share that does by Wilson, the unseen carried to the bounds."""
    n, estimate = len(values), float(values.mean())
    if bounds is None:
        why = f"fewer than {fewest} prompts differ from the rest"
        return _interval(estimate, None, n, why, level)
    found, counts = np.unique(_snapped(values[:, None]), return_counts=True)
    common = float(found[counts.argmax()])
    up, down = float((values - common).clip(0).mean()), float((common - values).clip(0).mean())
    share = 1 - float(counts.max()) / n
    least, most = _wilson(share, n, level)
    fewer, unseen = (least / share if share else 0.0), most - share
    low = common + up * fewer - down - unseen * (common - bounds[0])
    high = common + up - down * fewer + unseen * (bounds[1] - common)
    return _interval(estimate, (low, high), n, "Wilson on the prompts that differ", level, bounds)


@lru_cache(maxsize=8)
def _resamples(n: int, seed: int, count: int) -> Float[np.ndarray, "n resamples"]:
    """How often each of n prompts is in each resample; fewer resamples above 400 prompts."""
    count = min(count, max(2_000, 4_000_000 // n))
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), count)
    return np.ascontiguousarray(drawn.T, dtype=float)


@lru_cache(maxsize=8)
def _multivariate(n: int, seed: int, count: int) -> Float[np.ndarray, "n draws"]:
    """Weights that turn standardised values of n prompts into draws of multivariate t / sqrt(n)."""
    draw = np.random.default_rng(seed)
    return draw.standard_normal((n, count)) / np.sqrt(n * draw.chisquare(n - 1, count))


def _studentised(
    values: Cells, weights: Float[np.ndarray, "n resamples"]
) -> Float[np.ndarray, "cells resamples"]:
    """(Mean of each resample - mean) / standard deviation of the resample, for each cell."""
    n = len(values)
    apart, variance = values - values.mean(0), values.var(0, ddof=1)[:, None]
    shift = _sums(apart, weights) / n
    own = (_sums(apart**2, weights) / n - shift**2) * (n / (n - 1))
    # a resample of equal values has no variance of its own: the sample's stands in
    own = np.where(own > 1e-9 * variance, own, variance)
    return np.asarray(shift / np.sqrt(((n - 1) * own + PRIOR * variance) / (n - 1 + PRIOR)))


def _sums(
    values: Cells, weights: Float[np.ndarray, "n resamples"]
) -> Float[np.ndarray, "cells resamples"]:
    # not @: on matrices this small its threads cost 10 times more than they save on a busy machine
    return np.asarray(np.einsum("nc,nr->cr", values, weights))
