"""What intervals are made of: `Interval` itself, checks, quantiles, values that hardly differ."""

import math
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Float

from interp_steer.errors import RequestError, nearest

MINIMUM = 10  # prompts; no interval that was measured below it covers what it says
KINDS = ("mean", "rate")

Values = Float[np.ndarray, " n"]
Cells = Float[np.ndarray, "n cells"]
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


def interval(
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


def _digits(value: float, width: float) -> str:
    """A value to two digits of a width."""
    places = 1 - math.floor(math.log10(abs(width))) if width else 2
    return f"{value:.{min(max(places, 0), 9)}f}"


def check(
    values: Float[np.ndarray, "..."], level: float = 0.95, bounds: Limits | None = None
) -> None:
    if not values.size:
        raise RequestError("there are no values")
    if not np.isfinite(values).all():
        raise RequestError("a value is NaN or infinite; leave out what is missing, and count it")
    if not 0 < level < 1:
        raise RequestError(f"level is {level}, expected a share between 0 and 1")
    if bounds and not bounds[0] <= values.min() <= values.max() <= bounds[1]:
        raise RequestError(f"a value is outside its bounds {bounds[0]:g} and {bounds[1]:g}")


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise RequestError(f"unknown kind {kind!r}{nearest(kind, KINDS)}")


def check_paired(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise RequestError(f"{len(a)} and {len(b)} prompts are not paired")


def student(share: float, n: int) -> float:
    from scipy import special

    return float(special.stdtrit(n - 1, share))


def wilson(p: float, n: float, level: float, quantile: float | None = None) -> Limits:
    """Limits of a rate p of n, with the normal quantile unless another is given."""
    from scipy import special

    z2 = (quantile or float(special.ndtri((1 + level) / 2))) ** 2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    # at 0 and 1 the limit is the rate itself, which rounding may miss
    return (0.0 if p == 0 else centre - half), (1.0 if p == 1 else centre + half)


def seldom(values: Cells, fewest: int) -> Bool[np.ndarray, " cells"]:
    """Cells in which fewer than `fewest` prompts differ from the commonest value."""
    order = np.sort(snapped(values), axis=0)
    return np.asarray((order[:fewest] == order[-fewest:]).any(0))


def snapped(values: Cells) -> Cells:
    """Rounded to 9 digits of each cell's largest: differences of equal shares differ in bits."""
    scale = np.abs(values).max(0)
    scale = np.where(scale > 0, scale, 1.0)
    return np.asarray(np.round(values / scale, 9) * scale)


def carried(values: Values, level: float, bounds: Limits | None, fewest: int) -> Interval:
    """Where few prompts differ: the share that does by Wilson, the unseen carried to the bounds."""
    n, estimate = len(values), float(values.mean())
    if bounds is None:
        why = f"fewer than {fewest} prompts differ from the rest"
        return interval(estimate, None, n, why, level)
    found, counts = np.unique(snapped(values[:, None]), return_counts=True)
    common = float(found[counts.argmax()])
    up, down = float((values - common).clip(0).mean()), float((common - values).clip(0).mean())
    share = 1 - float(counts.max()) / n
    least, most = wilson(share, n, level)
    fewer, unseen = (least / share if share else 0.0), most - share
    low = common + up * fewer - down - unseen * (common - bounds[0])
    high = common + up - down * fewer + unseen * (bounds[1] - common)
    return interval(estimate, (low, high), n, "Wilson on the prompts that differ", level, bounds)
