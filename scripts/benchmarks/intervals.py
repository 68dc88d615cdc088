# %% [markdown]
# How often the intervals of `interp_steer.stats` hold the truth, on laws whose truth is known.
# Nominal 95 %; the bar is 93 to 97 %, and what falls outside is marked. Beside it the percentile
# bootstrap, which is what most code bases use.
#
#     python scripts/benchmarks/intervals.py
#     python scripts/benchmarks/intervals.py --simulations 200 --json
#
# 2,000 simulations have a standard error of 0.5 points. Samples without an interval count as
# neither: their share stands in the column "untold".

# %%
import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: the matrices are small

import numpy as np
from scipy import stats

from interp_steer.stats.interval import Interval
from interp_steer.stats.intervals import by_unit, difference, mean, rate, rate_by_unit
from interp_steer.stats.shares import ratio
from interp_steer.stats.simultaneous import bands, best_set

BAR = (0.93, 0.97)
SEEDS = 5
BOTH = (-1.0, 1.0)  # bounds of a difference of rates
draw = np.random.default_rng(20240607)


@dataclass(frozen=True)
class Measured:
    """One line of the table; shares of simulations, `covers` among those with an interval."""

    block: str
    law: str
    n: int
    covers: float
    truth_below: float | None = None  # the interval lies above the truth
    truth_above: float | None = None
    untold: float = 0.0
    width: float | None = None
    percentile: float | None = None


# %% [markdown]
# ## One mean, one value a prompt

# %%
MEANS: dict[str, tuple[Callable[[int], np.ndarray], float]] = {
    "normal": (lambda n: draw.normal(size=n), 0.0),
    "exponential": (lambda n: draw.exponential(size=n), 1.0),
    "chi-squared(1)": (lambda n: draw.chisquare(1, n), 1.0),
    "lognormal(0.5)": (lambda n: draw.lognormal(0, 0.5, n), float(np.exp(0.125))),
    "lognormal(1)": (lambda n: draw.lognormal(0, 1, n), float(np.exp(0.5))),
    "t(3)": (lambda n: draw.standard_t(3, n), 0.0),
    "half zero, half exponential": (
        lambda n: (draw.random(n) < 0.5) * draw.exponential(size=n),
        0.5,
    ),
    # such as the share of repeated 3-grams, which few answers have
    "0, but for 0.1 of prompts Beta(1, 9)": (
        lambda n: (draw.random(n) < 0.1) * draw.beta(1, 9, n),
        0.01,
    ),
    "0, but for 0.2 of prompts Beta(1, 9)": (
        lambda n: (draw.random(n) < 0.2) * draw.beta(1, 9, n),
        0.02,
    ),
    "0, but for 0.3 of prompts Beta(1, 1)": (
        lambda n: (draw.random(n) < 0.3) * draw.beta(1, 1, n),
        0.15,
    ),
}


def percentile(values: np.ndarray) -> tuple[float, float]:
    """The percentile bootstrap, as a comparison."""
    n = len(values)
    low, high = np.quantile(WEIGHTS[n] @ values / n, [0.025, 0.975])
    return float(low), float(high)


WEIGHTS = {n: draw.multinomial(n, np.full(n, 1 / n), 2_000).astype(float) for n in (20, 30, 50)}


def measure(
    block: str,
    law: str,
    n: int,
    simulations: int,
    truth: float,
    once: Callable[[], tuple[Interval, np.ndarray]],
) -> Measured:
    """`once` draws a sample: its interval, and one value a prompt for the percentile bootstrap."""
    below = above = untold = beside = 0
    width = 0.0
    for _ in range(simulations):
        found, values = once()
        low, high = percentile(values)
        beside += low <= truth <= high
        if found.low is None or found.high is None:
            untold += 1
            continue
        # a limit that is the truth up to rounding holds it
        below += truth < found.low - 1e-12
        above += truth > found.high + 1e-12
        width += found.high - found.low
    told = max(simulations - untold, 1)
    return Measured(
        block, law, n, 1 - (below + above) / told, below / told, above / told,
        untold / simulations, width / told, beside / simulations,
    )  # fmt: skip


def means(simulations: int) -> Iterator[Measured]:
    for n in (20, 50):
        for law, (sample, truth) in MEANS.items():

            def once(n: int = n, sample: Callable = sample) -> tuple[Interval, np.ndarray]:
                values = sample(n)
                return mean(values), values

            yield measure("mean", law, n, simulations, truth, once)


# %% [markdown]
# ## Rates: one answer a prompt. These are exact sums over all counts, not simulations.


# %%
def rates(_: int) -> Iterator[Measured]:
    for n in (20, 50):
        counts = np.arange(n + 1)
        outcomes = [np.arange(n) < k for k in counts]
        found = [rate(one) for one in outcomes]
        low, high = (np.array([getattr(one, end) for one in found]) for end in ("low", "high"))
        beside = np.array([percentile(one.astype(float)) for one in outcomes])

        def line(law: str, p: np.ndarray, n: int = n, counts=counts, low=low, high=high,
                 beside=beside) -> Measured:  # fmt: skip
            weight, p = stats.binom.pmf(counts, n, p[:, None]), p[:, None]

            def share(which: np.ndarray) -> float:
                return float((weight * which).sum(1).mean())

            return Measured(
                "rate", law, n, share((low <= p) & (p <= high)), share(p < low), share(p > high),
                width=share(np.broadcast_to(high - low, weight.shape)),
                percentile=share((beside[:, 0] <= p) & (p <= beside[:, 1])),
            )  # fmt: skip

        for p in (0.02, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9):
            yield line(f"p = {p}", np.array([p]))
        yield line("p uniform on (0, 1)", np.linspace(0.0005, 0.9995, 1000))


# %% [markdown]
# ## Five seeds a prompt: the prompt is the unit


# %%
def answers(n: int, p: float, icc: float) -> np.ndarray:
    """Beta-binomial 0/1 answers, n prompts x SEEDS; icc is the correlation within a prompt."""
    chance = draw.beta(p * (1 / icc - 1), (1 - p) * (1 / icc - 1), n)
    return draw.random((n, SEEDS)) < chance[:, None]


def seeds(simulations: int) -> Iterator[Measured]:
    for n in (20, 50):
        units = [unit for unit in range(n) for _ in range(SEEDS)]

        def normal(n: int = n, units: list[int] = units) -> tuple[Interval, np.ndarray]:
            each = by_unit((draw.normal(size=(n, 1)) + draw.normal(size=(n, SEEDS))).ravel(), units)
            return mean(each), each

        yield measure("5 seeds, mean", "normal, icc 0.5", n, simulations, 0.0, normal)
        for p, icc in [(0.02, 0.3), (0.05, 0.3), (0.1, 0.1), (0.1, 0.3), (0.1, 0.7), (0.3, 0.3),
                       (0.5, 0.1), (0.5, 0.3), (0.5, 0.7), (0.9, 0.3)]:  # fmt: skip

            def binary(
                n: int = n, p: float = p, icc: float = icc, units: list[int] = units
            ) -> tuple[Interval, np.ndarray]:
                each = answers(n, p, icc)
                return rate_by_unit(each.ravel(), units), each.mean(1)

            law = f"p = {p}, icc {icc}"
            yield measure("5 seeds, rate", law, n, simulations, p, binary)


# %% [markdown]
# ## Differences of rates, paired over prompts

# %%
# shares of prompts that succeed in both arms, in the first alone, in the second alone
PAIRS = [(0.3, 0.3, 0.1), (0.1, 0.1, 0.05), (0.05, 0.3, 0.05), (0.6, 0.2, 0.1), (0.3, 0.1, 0.1),
         (0.45, 0.25, 0.1), (0.1, 0.8, 0.02), (0.0, 0.3, 0.0), (0.0, 0.1, 0.0)]  # fmt: skip


def differences(simulations: int) -> Iterator[Measured]:
    n = 50
    for both, one, other in PAIRS:

        def paired(
            both: float = both, one: float = one, other: float = other
        ) -> tuple[Interval, np.ndarray]:
            where = draw.choice(4, n, p=[both, one, other, 1 - both - one - other])
            a, b = where <= 1, (where == 0) | (where == 2)
            return difference(a, b, "rate"), a.astype(float) - b

        law = f"both {both}, one {one}, other {other}"
        yield measure("paired rates", law, n, simulations, one - other, paired)
    for n in (20, 50):
        for p, q in [(0.5, 0.2), (0.3, 0.3), (0.1, 0.02)]:

            def averaged(n: int = n, p: float = p, q: float = q) -> tuple[Interval, np.ndarray]:
                a, b = answers(n, p, 0.3).mean(1), answers(n, q, 0.3).mean(1)
                return difference(a, b, "rate"), a - b

            law = f"p = {p} and {q}, icc 0.3"
            yield measure("5 seeds, paired rates", law, n, simulations, p - q, averaged)


# %% [markdown]
# ## Shares of an effect: ratios of means, numerator and denominator of one prompt paired


# %%
def ratios(simulations: int) -> Iterator[Measured]:
    def shifted(law: np.ndarray, share: float, noise: float) -> tuple[np.ndarray, np.ndarray]:
        return share * law + noise * draw.normal(size=len(law)), law

    def of_each(effect: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return draw.beta(2, 2, len(effect)) * effect, effect

    laws: dict[str, tuple[Callable[[int], tuple[np.ndarray, np.ndarray]], float]] = {
        "normal effect, cv 0.5": (lambda n: shifted(1 + draw.normal(size=n) / 2, 0.3, 0.3), 0.3),
        "normal effect, cv 2": (lambda n: shifted(1 + 2 * draw.normal(size=n), 0.3, 0.3), 0.3),
        "lognormal(0.5) effect": (lambda n: shifted(draw.lognormal(0, 0.5, n), 0.3, 0.3), 0.3),
        "lognormal(1) effect": (lambda n: shifted(draw.lognormal(0, 1, n), 0.3, 0.3), 0.3),
        "exponential, share beta(2, 2)": (lambda n: of_each(draw.exponential(size=n)), 0.5),
        "t(3) effect": (lambda n: shifted(1.5 + draw.standard_t(3, n), 0.4, 0.5), 0.4),
    }
    for n in (20, 50):
        for law, (sample, truth) in laws.items():

            def once(n: int = n, sample: Callable = sample) -> tuple[Interval, np.ndarray]:
                part, whole = sample(n)
                r = part.mean() / whole.mean()
                return ratio(part, whole), r + (part - r * whole) / whole.mean()  # linear in r

            yield measure("ratio of means", law, n, simulations, truth, once)


# %% [markdown]
# ## Many cells over the same prompts (correlation 0.5 between cells)


# %%
def normals(n: int, cells: int) -> np.ndarray:
    return (draw.normal(size=(n, 1)) + draw.normal(size=(n, cells))) / np.sqrt(2)


def simultaneous(simulations: int) -> Iterator[Measured]:
    n, cells = 30, 40
    laws: dict[str, tuple[Callable[[], np.ndarray], float, tuple[float, float] | None]] = {
        "normal": (lambda: normals(n, cells), 0.0, None),
        "exponential": (lambda: -np.log(stats.norm.sf(normals(n, cells))), 1.0, None),
        "t(3)": (
            lambda: normals(n, cells) / np.sqrt(draw.chisquare(3, (n, 1)) / 3),
            0.0,
            None,
        ),
        "rates 0.5 less 0.2": (
            lambda: (normals(n, cells) < 0) - 1.0 * (draw.random((n, 1)) < 0.2),
            0.3,
            BOTH,
        ),
        "rates 0.1 less 0": (lambda: 1.0 * (normals(n, cells) < stats.norm.ppf(0.1)), 0.1, BOTH),
    }
    for law, (sample, truth, bounds) in laws.items():
        covered = beside = 0
        width = untold = 0.0
        for number in range(simulations):
            values = sample()
            found = bands(values, bounds=bounds, kind="rate" if bounds else "mean")
            told = [(one.low, one.high) for one in found if one.low is not None]
            covered += all(low <= truth <= high for low, high in told)
            width += float(np.mean([high - low for low, high in told]))
            untold += 1 - len(told) / cells
            if number % 4 == 0:  # the slowest part is the comparison
                low, high = np.quantile(WEIGHTS[n] @ values / n, [0.025, 0.975], axis=0)
                beside += bool(((low <= truth) & (truth <= high)).all())
        yield Measured(
            "all of 40 bands", law, n, covered / simulations, untold=untold / simulations,
            width=width / simulations, percentile=beside / -(-simulations // 4),
        )  # fmt: skip


def sets(simulations: int) -> Iterator[Measured]:
    """`covers`: the true best is in the set; `width`: how many cells are."""
    n, cells = 30, 20
    steps = 0.1 * np.arange(cells)
    laws: dict[str, Callable[[], np.ndarray]] = {
        "normal, all equal": lambda: normals(n, cells),
        "normal, 0.1 apart": lambda: normals(n, cells) - steps,
        "exponential, all equal": lambda: -np.log(stats.norm.sf(normals(n, cells))),
        "rates 0.3, all equal": lambda: 1.0 * (normals(n, cells) < stats.norm.ppf(0.3)),
        "rates 0.1, all equal": lambda: 1.0 * (normals(n, cells) < stats.norm.ppf(0.1)),
    }
    for law, sample in laws.items():
        found = [best_set(sample()) for _ in range(simulations)]
        yield Measured(
            "best of 20 in the set", law, n, float(np.mean([0 in one for one in found])),
            width=float(np.mean([len(one) for one in found])),
        )  # fmt: skip


# %%
def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Coverage of nominal 95 % intervals.")
    parser.add_argument("--simulations", type=int, default=2_000)
    parser.add_argument("--json", action="store_true", help="one object a line")
    given = parser.parse_args()
    begun = time.perf_counter()
    if not given.json:
        print(
            "| what | law | n | covers % | truth below / above | untold % | width | percentile % |"
        )
        print("|---|---|---|---|---|---|---|---|")
    for block in (means, rates, seeds, differences, ratios, simultaneous, sets):
        for line in block(given.simulations):
            inside = bool(BAR[0] <= line.covers and (line.covers <= BAR[1] or block is sets))
            if given.json:
                print(json.dumps({**asdict(line), "inside": inside}))
                continue
            sides = f"{percent(line.truth_below)} / {percent(line.truth_above)}"
            mark = "" if inside else " (outside)"
            width = "" if line.width is None else f"{line.width:.3g}"
            print(
                f"| {line.block} | {line.law} | {line.n} | {percent(line.covers)}{mark} | {sides} "
                f"| {percent(line.untold)} | {width} | {percent(line.percentile)} |"
            )
    if not given.json:
        print(f"\n{given.simulations} simulations a line, {time.perf_counter() - begun:.0f} s")
