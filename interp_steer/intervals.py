"""How sure a number is, when the prompt is what was drawn.

Every interval here is over prompts (units): all seeds of a prompt are averaged first (`by_unit`).
Below `MINIMUM` prompts only the point is told. `scripts/coverage.py` measures what is promised.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from interp_steer.errors import RequestError, nearest

MINIMUM = 10  # prompts; below it every interval that was measured lies
KINDS = ("mean", "rate")

# With fewer prompts than this that differ from the commonest value, the spread itself is a guess.
# Extreme quantiles over many cells ask for more of them than one interval does. Both are measured.
DIFFERING, DIFFERING_IN_BANDS = 3, 5
# A resample's standard deviation counts as at least this share of the sample's: below it t explodes
# (intervals of zero-inflated values grew tenfold) and no coverage was gained.
FLOOR = 0.2
RESAMPLES, RESAMPLES_OF_A_SET = 10_000, 2_000
SIGN_FLIPS = 9_999

Bounds = tuple[float, float]


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
            return f"{self.estimate:.{_decimals(self.estimate)}f} ({why}: no interval)"
        places = _decimals(self.high - self.low)
        limits = f"[{self.low:.{places}f}, {self.high:.{places}f}]"
        return f"{self.estimate:.{places}f} {limits}"

    def as_json(self) -> dict[str, float | int | str | None]:
        """As a program reads it."""
        return asdict(self)


class Missing(NamedTuple):
    """A score some of whose values are missing: neither zero nor random.

    Attributes:
        interval: of the values that are there.
        n_missing: how many are not.
        with_zero: the estimate with every missing value as 0, the score's lower bound.
    """

    interval: Interval
    n_missing: int
    with_zero: float


class Steerability(NamedTuple):
    """The mean slope over prompts, and the share of prompts whose slope is negative."""

    slope: Interval
    negative: Interval


def mean(
    values: Float[np.ndarray, " n"],
    level: float = 0.95,
    seed: int = 0,
    bounds: Bounds | None = None,
) -> Interval:
    """The mean of one value a prompt, or of one paired difference a prompt.

    At each end the wider of the studentised bootstrap (Hall 1988; Efron and Tibshirani 1993, ch.
    12) and Student's t. The bootstrap alone covers skewed values but not heavy tails (92 % of t
    with 3 degrees of freedom), Student's t alone the reverse (86 % of lognormal values at n = 20);
    the wider of both costs 2 to 4 % of width on normal values.

    Where fewer than `DIFFERING` prompts differ from the commonest value, all equal included,
    nothing tells how far the unseen ones lie, and there is no interval unless `bounds` say so.
    Then, if a share p of prompts differs, with Wilson's interval of p, the unseen ones may lie at
    a bound: 20 equal zeros between -1 and 1 give [-0.16, 0.16], and 0/1 values Wilson's interval.

    Args:
        values: finite, one a prompt.
        level: nominal coverage.
        seed: of the resampling; a seed gives the same interval every time.
        bounds: what no value can pass, (0, 1) for rates, (-1, 1) for their differences; the
            limits are cut there.

    Raises:
        RequestError: no values, one that is not finite or passes the bounds, or a wrong level.
    """
    _check(values, level, bounds)
    n, estimate = len(values), float(values.mean())
    if n < MINIMUM:
        return _point(estimate, n, level)
    if _seldom(values[:, None], DIFFERING)[0]:
        return _carried(values, level, bounds, DIFFERING)
    centre, spread, t = _studentised(values[:, None], _resamples(n, seed, RESAMPLES))
    tail = (1 - level) / 2
    student = _t_quantile(1 - tail, n) / math.sqrt(n)
    below, above = np.quantile(t[:, 0], [tail, 1 - tail])
    low = float(centre[0] - spread[0] * max(above, student))
    high = float(centre[0] - spread[0] * min(below, -student))
    return _cut(estimate, low, high, n, "studentised bootstrap over prompts", level, bounds)


def rate(successes: Bool[np.ndarray, " n"], level: float = 0.95) -> Interval:
    """A rate over prompts with one answer each: Wilson's score interval (Wilson 1927).

    Its coverage averages 95 % over p and swings with p and n, as that of any interval of a count
    must (Brown, Cai and DasGupta 2001).

    Raises:
        RequestError: no values, or a wrong level.
    """
    _check(successes.astype(float), level)
    n, p = len(successes), float(successes.mean())
    if n < MINIMUM:
        return _point(p, n, level)
    return Interval(p, *_wilson(p, n, level), n, "Wilson", level)


def by_unit(
    values: Float[np.ndarray, " n"], units: Sequence[str] | Sequence[int]
) -> Float[np.ndarray, " units"]:
    """The mean of each prompt's values, all its seeds together.

    In the order of the sorted units, so that two arms over the same prompts are paired.

    Args:
        values: one a row.
        units: the prompt of each row, by name or number.

    Raises:
        RequestError: no values, not one unit a value, or a value that is not finite.
    """
    return _grouped(values, units)[0]


def rate_by_unit(
    successes: Bool[np.ndarray, " n"],
    units: Sequence[str] | Sequence[int],
    level: float = 0.95,
) -> Interval:
    """A rate over prompts with several answers (seeds) each; every prompt counts the same.

    Wilson's interval at the effective sample size p (1 - p) / variance of the estimate, never
    fewer than prompts or more than answers, with Student's quantile because that variance is
    estimated (Korn and Graubard 1998; Franco et al. 2019). Where fewer than `DIFFERING` prompts
    have a success, or a failure, the variance means nothing and the prompts are counted.

    Raises:
        RequestError: as `by_unit`, or a wrong level.
    """
    shares, counts = _grouped(successes.astype(float), units)
    _check(shares, level)
    n, p = len(shares), float(shares.mean())
    if n < MINIMUM:
        return _point(p, n, level)
    if counts.max() == 1:
        return Interval(p, *_wilson(p, n, level), n, "Wilson", level)
    size, quantile = float(n), None
    if min((shares > 0).sum(), (shares < 1).sum()) >= DIFFERING:
        variance = float(shares.var(ddof=1)) / n
        largest = float(counts.sum())
        size = min(max(p * (1 - p) / variance, n), largest) if variance > 0 else largest
        quantile = _t_quantile((1 + level) / 2, n)
    limits = _wilson(p, size, level, quantile)
    return Interval(p, *limits, n, "Wilson at the effective sample size", level)


def difference(
    a: Float[np.ndarray, " n"] | Bool[np.ndarray, " n"],
    b: Float[np.ndarray, " n"] | Bool[np.ndarray, " n"],
    kind: str = "mean",
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """a - b, paired over prompts.

    Args:
        a, b: one value a prompt, the same prompts in the same order.
        kind: "mean"; or "rate": shares of successes. Those of one answer a prompt take Newcombe's
            method 10 for paired differences (Newcombe 1998, Statistics in Medicine 17, 2635);
            those averaged over seeds take the mean of the differences, bounded by -1 and 1.
        level, seed: as in `mean`.

    Raises:
        RequestError: an unknown kind, a rate outside [0, 1], or as `mean`.
    """
    _check_kind(kind)
    a, b = a.astype(float), b.astype(float)
    if kind == "mean":
        return mean(a - b, level, seed)
    for arm in (a, b):
        _check(arm, level, (0.0, 1.0))
    n, estimate = len(a), float(a.mean() - b.mean())
    if n < MINIMUM or not np.isin(np.concatenate([a, b]), (0, 1)).all():
        return mean(a - b, level, seed, (-1.0, 1.0))
    p, q = float(a.mean()), float(b.mean())
    (p_low, p_high), (q_low, q_high) = _wilson(p, n, level), _wilson(q, n, level)
    both = float((a * b).sum())
    # the correlation of the two rates; a positive one is corrected for continuity
    together = both * (n - a.sum() - b.sum() + both) - (a.sum() - both) * (b.sum() - both)
    together = max(together - n / 2, 0) if together > 0 else together
    scale = n**2 * math.sqrt(p * (1 - p) * q * (1 - q))
    phi = together / scale if scale > 0 else 0.0

    def distance(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * phi * one * other + other**2, 0))

    low = estimate - distance(p - p_low, q_high - q)
    high = estimate + distance(p_high - p, q - q_low)
    return _cut(estimate, low, high, n, "paired Newcombe", level, (-1.0, 1.0))


def exact_p(a: Bool[np.ndarray, " n"], b: Bool[np.ndarray, " n"]) -> float:
    """McNemar's exact test that two paired rates are equal, two-sided (McNemar 1947)."""
    from scipy import special

    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return min(1.0, 2 * float(special.bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def permutation_p(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], seed: int = 0) -> float:
    """Two-sided sign-flip test of the mean of a - b, paired over prompts (Fisher 1935).

    Exact where at most 12 differences are not zero (zeros have no sign); else over `SIGN_FLIPS`
    random flips, the observed one counted too.

    Raises:
        RequestError: no values, or one that is not finite.
    """
    _check(a - b)
    apart = (a - b)[a != b]
    k, observed = len(apart), abs(apart.sum())
    slack = 1e-9 * np.abs(apart).sum()  # sums in another order round differently
    if k <= 12:
        signs = 1 - 2 * (np.arange(2**k)[:, None] >> np.arange(k) & 1)
        return float((np.abs(signs @ apart) >= observed - slack).mean())
    signs = 1 - 2 * np.random.default_rng(seed).integers(0, 2, (SIGN_FLIPS, k), dtype=np.int8)
    return p_null(float(observed - slack), np.abs(signs @ apart))


def bands(
    values: Float[np.ndarray, "n cells"],
    level: float = 0.95,
    seed: int = 0,
    bounds: Bounds | None = None,
) -> list[Interval]:
    """Intervals of every cell's mean that hold all together, over the same prompts.

    Studentised bootstrap of the largest and the smallest t over the cells (max-t; Westfall and
    Young 1993; Romano and Wolf 2005), whole prompts resampled, so that cells keep their
    correlation. A cell in which fewer than `DIFFERING_IN_BANDS` prompts differ from its commonest
    value has no interval, or with `bounds` that of `mean` at Bonferroni's level, and does not
    widen the others.

    Raises:
        RequestError: as `mean`.
    """
    _check(values, level, bounds)
    n, cells = values.shape
    if n < MINIMUM:
        return [_point(float(one), n, level) for one in values.mean(0)]
    seldom = _seldom(values, DIFFERING_IN_BANDS)
    kept, weights = np.flatnonzero(~seldom), _resamples(n, seed, RESAMPLES)
    least, most = np.zeros(len(weights)), np.zeros(len(weights))
    for start in range(0, len(kept), 64):  # bounds the memory
        _, _, t = _studentised(values[:, kept[start : start + 64]], weights)
        least, most = np.minimum(least, t.min(1)), np.maximum(most, t.max(1))
    tail = (1 - level) / 2
    below, above = np.quantile(least, tail), np.quantile(most, 1 - tail)
    centre, spread = values.mean(0), values.std(0, ddof=1)
    low, high = centre - spread * above, centre - spread * below
    found = []
    for cell in range(cells):
        if seldom[cell]:
            alone = _carried(
                values[:, cell], 1 - (1 - level) / cells, bounds, DIFFERING_IN_BANDS, "simultaneous"
            )
            found.append(Interval(**{**asdict(alone), "level": level}))
            continue
        method = "simultaneous studentised bootstrap over prompts"
        limits = float(low[cell]), float(high[cell])
        found.append(_cut(float(centre[cell]), *limits, n, method, level, bounds))
    return found


def best_set(values: Float[np.ndarray, "n cells"], level: float = 0.95, seed: int = 0) -> list[int]:
    """The cells that cannot be excluded from having the largest mean, over the same prompts.

    Multiple comparisons with the best (Hsu 1984): a cell is excluded if another one beats it by
    more than the critical value of the largest t of all others against it, so that the best cell
    is in the set with probability `level`. The critical value is the larger of the studentised
    bootstrap's and multivariate t's with the same correlation (Dunnett 1955). Differences in which
    fewer than `DIFFERING_IN_BANDS` prompts differ from the commonest one exclude nothing; below
    `MINIMUM` prompts every cell is in the set.

    Raises:
        RequestError: as `mean`.
    """
    _check(values, level)
    n, cells = values.shape
    if n < MINIMUM:
        return list(range(cells))
    one = _t_quantile(level, n) / math.sqrt(n)  # no critical value of several t is smaller
    found = []
    for cell in range(cells):
        ahead = np.delete(values, cell, axis=1) - values[:, [cell]]
        ahead = ahead[:, ~_seldom(ahead, DIFFERING_IN_BANDS)]
        largest = (ahead.mean(0) / ahead.std(0, ddof=1)).max(initial=-math.inf)
        if largest > one:
            _, spread, t = _studentised(ahead, _resamples(n, seed, RESAMPLES_OF_A_SET))
            normal = _normal(n, seed, RESAMPLES_OF_A_SET) @ ((ahead - ahead.mean(0)) / spread)
            if largest > max(np.quantile(draws.max(1), level) for draws in (t, normal)):
                continue
        found.append(cell)
    return found


def p_null(observed: float, nulls: Float[np.ndarray, " k"]) -> float:
    """How often a control reaches what was observed: (1 + #null >= observed) / (1 + #null).

    One-sided, larger is more (Davison and Hinkley 1997, 4.2).

    Raises:
        RequestError: no nulls, or a number that is not finite.
    """
    _check(np.append(nulls, observed))
    if not len(nulls):
        raise RequestError("there are no null values to compare with")
    return float(1 + (nulls >= observed).sum()) / (1 + len(nulls))


def missing(
    values: Sequence[float | None], kind: str = "mean", level: float = 0.95, seed: int = 0
) -> Missing:
    """One score a prompt, some of which (None or NaN) could not be had.

    Args:
        values: never negative, so that 0 is the worst score.
        kind: "mean", or "rate" where every score is 0 or 1.
        level, seed: as in `mean`.

    Raises:
        RequestError: all are missing, one is negative, a rate is not 0 or 1, or as `mean`.
    """
    _check_kind(kind)
    scores = np.array([math.nan if one is None else one for one in values], dtype=float)
    there = scores[~np.isnan(scores)]
    if not len(there):
        raise RequestError("every value is missing")
    if (there < 0).any():
        raise RequestError("a score is negative: counted as 0, the missing give no lower bound")
    if kind == "rate" and not np.isin(there, (0, 1)).all():
        raise RequestError("a rate is of values that are 0 or 1")
    interval = rate(there == 1, level) if kind == "rate" else mean(there, level, seed)
    return Missing(interval, len(scores) - len(there), float(there.sum()) / len(scores))


def slopes(x: Float[np.ndarray, " k"], y: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
    """Least-squares slope of each prompt's y against x, in units of y per unit of x.

    With propensities log p(y+) - log p(y-) against multipliers this is the steerability of Tan et
    al. 2024 (arXiv 2407.12404).

    Raises:
        RequestError: x does not vary, or a value is not finite.
    """
    _check(x)
    _check(y)
    centred = x - x.mean()
    if not np.ptp(x):
        raise RequestError("a slope needs at least two different multipliers")
    return (y - y.mean(1, keepdims=True)) @ centred / (centred @ centred)


def steerability(
    x: Float[np.ndarray, " k"], y: Float[np.ndarray, "n k"], level: float = 0.95, seed: int = 0
) -> Steerability:
    """The mean of `slopes` over prompts, and Wilson's interval of the share that is negative.

    Raises:
        RequestError: as `slopes` and `mean`.
    """
    each = slopes(x, y)
    return Steerability(mean(each, level, seed), rate(each < 0, level))


def _check(
    values: Float[np.ndarray, "*any"], level: float = 0.95, bounds: Bounds | None = None
) -> None:
    if not values.size:
        raise RequestError("there are no values")
    if not np.isfinite(values).all():
        raise RequestError(
            "a value is NaN or infinite; leave it out with missing(), do not hide it"
        )
    if not 0 < level < 1:
        raise RequestError(f"level is {level}, expected a share between 0 and 1")
    if bounds and not bounds[0] <= values.min() <= values.max() <= bounds[1]:
        raise RequestError(f"a value is outside its bounds {bounds[0]:g} and {bounds[1]:g}")


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise RequestError(f"unknown kind {kind!r}{nearest(kind, KINDS)}")


def _decimals(width: float) -> int:
    """Places that show two digits of a width, at least two."""
    return 2 if width == 0 else min(max(2, 1 - math.floor(math.log10(abs(width)))), 9)


def _point(estimate: float, n: int, level: float) -> Interval:
    return Interval(estimate, None, None, n, f"fewer than {MINIMUM} prompts", level)


def _cut(
    estimate: float,
    low: float,
    high: float,
    n: int,
    method: str,
    level: float,
    bounds: Bounds | None,
) -> Interval:
    """An interval that does not pass the bounds."""
    if bounds:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Interval(estimate, low, high, n, method, level)


def _grouped(
    values: Float[np.ndarray, " n"], units: Sequence[str] | Sequence[int]
) -> tuple[Float[np.ndarray, " units"], Float[np.ndarray, " units"]]:
    """Mean and number of each unit's values, by sorted unit."""
    _check(values)
    if len(units) != len(values):
        raise RequestError(f"{len(values)} values of {len(units)} units: expected one unit a value")
    _, which = np.unique(np.asarray(units), return_inverse=True)
    counts = np.bincount(which).astype(float)
    return np.bincount(which, weights=values) / counts, counts


def _t_quantile(share: float, n: int) -> float:
    from scipy import special

    return float(special.stdtrit(n - 1, share))


def _wilson(p: float, n: float, level: float, quantile: float | None = None) -> tuple[float, float]:
    """Limits of a rate p of n, with the normal quantile unless another is given."""
    from scipy import special

    z2 = (quantile or float(special.ndtri((1 + level) / 2))) ** 2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    # at 0 and 1 the limit is the rate itself, which rounding may miss
    return (0.0 if p == 0 else centre - half), (1.0 if p == 1 else centre + half)


def _seldom(values: Float[np.ndarray, "n cells"], fewest: int) -> Bool[np.ndarray, " cells"]:
    """Cells in which fewer than `fewest` prompts differ from the commonest value."""
    scale = np.abs(values).max(0)
    # differences of equal shares differ in their last bits
    order = np.sort(np.round(values / np.where(scale > 0, scale, 1), 9), axis=0)
    return (order[:fewest] == order[-fewest:]).any(0)


def _carried(
    values: Float[np.ndarray, " n"],
    level: float,
    bounds: Bounds | None,
    fewest: int,
    prefix: str = "",
) -> Interval:
    """Where few prompts differ: the share that does by Wilson, the unseen carried to the bounds."""
    n, estimate = len(values), float(values.mean())
    if bounds is None:
        return Interval(
            estimate, None, None, n, f"fewer than {fewest} prompts differ from the rest", level
        )
    found, counts = np.unique(values, return_counts=True)
    common = float(found[counts.argmax()])
    apart = values - common
    up, down = float(apart.clip(0).mean()), float((-apart).clip(0).mean())
    share = float((apart != 0).mean())
    least, most = _wilson(share, n, level)
    fewer, unseen = (least / share if share else 0.0), most - share
    low = common + up * fewer - down - unseen * (common - bounds[0])
    high = common + up - down * fewer + unseen * (bounds[1] - common)
    method = f"{prefix} Wilson on the prompts that differ".strip()
    return _cut(estimate, low, high, n, method, level, bounds)


@lru_cache(maxsize=8)
def _resamples(n: int, seed: int, count: int) -> Float[np.ndarray, "resamples n"]:
    """How often each of n prompts is in each resample; fewer resamples above 400 prompts."""
    count = min(count, max(2_000, 4_000_000 // n))
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), count).astype(float)
    drawn.flags.writeable = False
    return drawn


@lru_cache(maxsize=8)
def _normal(n: int, seed: int, count: int) -> Float[np.ndarray, "resamples n"]:
    """Weights that turn standardised values of n prompts into draws of multivariate t / sqrt(n)."""
    draw = np.random.default_rng(seed)
    scale = np.sqrt(draw.chisquare(n - 1, (count, 1)) * n)
    return draw.standard_normal((count, n)) / scale


def _studentised(
    values: Float[np.ndarray, "n cells"], weights: Float[np.ndarray, "resamples n"]
) -> tuple[
    Float[np.ndarray, " cells"], Float[np.ndarray, " cells"], Float[np.ndarray, "resamples cells"]
]:
    """Mean and standard deviation of each cell, and (resampled - mean) / resampled deviation."""
    n = len(values)
    centre, spread = values.mean(0), values.std(0, ddof=1)
    apart = values - centre
    shift = weights @ apart / n
    variance = (weights @ apart**2 / n - shift**2) * (n / (n - 1))
    own = np.sqrt(variance.clip(0))
    # a resample of equal values has no deviation of its own: the sample's stands in
    own = np.where(own > 1e-6 * spread, np.maximum(own, FLOOR * spread), spread)
    return centre, spread, shift / own
