import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from interp_steer.errors import RequestError
from interp_steer.stats import interval, resampling
from interp_steer.stats.chance import exact_p, p_null, permutation_p
from interp_steer.stats.interval import Interval
from interp_steer.stats.intervals import (
    by_unit,
    difference,
    mean,
    rate,
    rate_by_unit,
    slopes,
    steerability,
)
from interp_steer.stats.simultaneous import bands, best_set


def ends(one: Interval) -> tuple[float, float]:
    assert one.low is not None and one.high is not None, one
    return one.low, one.high


def holds(one: Interval, truth: float) -> bool:
    low, high = ends(one)
    return low <= truth <= high


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    found = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return found.low, found.high


def studentised(values: np.ndarray, level: float) -> tuple[float, float]:
    """The interval of `mean`, resample by resample with indices."""
    draw, n, spread = np.random.default_rng(99), len(values), values.std(ddof=1)
    t = []
    for _ in range(8_000):
        again = values[draw.integers(0, n, n)]
        # the sample's variance is worth half a prompt
        own = math.sqrt(((n - 1) * again.var(ddof=1) + 0.5 * spread**2) / (n - 0.5))
        t.append((again.mean() - values.mean()) / own)
    below, above = np.quantile(t, [(1 - level) / 2, (1 + level) / 2])
    student = stats.t.interval(level, n - 1, values.mean(), spread / math.sqrt(n))
    return (
        min(values.mean() - above * spread, student[0]),
        max(values.mean() - below * spread, student[1]),
    )


def table(both: int, one: int, other: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = np.repeat([True, True, False, False], [both, one, other, neither])
    return a, np.repeat([True, False, True, False], [both, one, other, neither])


# one mean


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("law", ["normal", "exponential", "t"])
def test_mean_is_the_wider_of_the_studentised_bootstrap_and_student(law, level):
    draw = np.random.default_rng(1)
    values = draw.standard_t(3, 30) if law == "t" else getattr(draw, law)(size=30)
    found = mean(values, level)
    assert found.estimate == values.mean() and found.n == 30 and found.level == level
    width = found.high - found.low
    assert ends(found) == pytest.approx(studentised(values, level), abs=0.03 * width)
    student = stats.t.interval(level, 29, values.mean(), stats.sem(values))
    assert found.low <= student[0] + 1e-12 and found.high >= student[1] - 1e-12


def test_studentised_resamples_are_what_repeating_the_prompts_gives():
    draw = np.random.default_rng(19)
    values = draw.exponential(size=(12, 3))
    weights = draw.multinomial(12, np.full(12, 1 / 12), 5).T.astype(float)
    for times, t in zip(weights.T, resampling.studentised(values, weights).T, strict=True):
        again = np.repeat(values, times.astype(int), axis=0)
        # the sample's variance is worth half a prompt
        own = (11 * again.var(0, ddof=1) + 0.5 * values.var(0, ddof=1)) / 11.5
        assert t == pytest.approx((again.mean(0) - values.mean(0)) / np.sqrt(own))


def test_mean_is_near_bca_where_the_sample_is_large():
    values = np.random.default_rng(2).exponential(size=300)
    bca = stats.bootstrap((values,), np.mean, n_resamples=9_999, rng=np.random.default_rng(0))
    found = mean(values)
    near = 0.06 * (found.high - found.low)
    assert ends(found) == pytest.approx(tuple(bca.confidence_interval), abs=near)


def test_mean_covers_skewed_values_where_the_percentile_bootstrap_does_not():
    draw = np.random.default_rng(33)
    n, simulations = 20, 600
    weights = draw.multinomial(n, np.full(n, 1 / n), 1_000) / n
    for law in ("exponential", "chi-squared"):
        values = draw.exponential(size=(simulations, n))
        values = values if law == "exponential" else draw.chisquare(1, (simulations, n))
        covered = np.mean([holds(mean(one), 1) for one in values])
        assert 0.93 <= covered <= 0.97, law
        low, high = np.quantile(values @ weights.T, [0.025, 0.975], axis=1)
        assert np.mean((low <= 1) & (high >= 1)) < 0.92, law


def test_mean_covers_heavy_tails_where_the_studentised_bootstrap_alone_does_not():
    draw = np.random.default_rng(4)
    assert np.mean([holds(mean(draw.standard_t(3, 20)), 0) for _ in range(600)]) > 0.945


def test_mean_is_the_same_every_time_and_moves_with_its_values():
    values = np.random.default_rng(5).exponential(size=25)
    found = mean(values)
    assert found == mean(values) != mean(values, seed=1)
    moved = mean(3 - 2 * values)
    assert (moved.high, moved.low) == pytest.approx([3 - 2 * end for end in ends(found)])


def test_below_ten_prompts_there_is_only_a_point():
    for found in [
        mean(np.arange(9.0)),
        rate(np.ones(9, bool)),
        rate_by_unit(np.ones(18, bool), list(range(9)) * 2),
        difference(np.ones(9), np.zeros(9), "rate"),
        bands(np.ones((9, 1)))[0],
        bands(np.ones((1, 1)))[0],
        mean(np.ones(1)),
    ]:
        assert found.low is found.high is None and found.n < 10
        assert found.method == "fewer than 10 prompts"
    assert mean(np.arange(10.0)).low is not None


def test_equal_values_tell_no_interval_and_of_rates_the_unseen_lie_at_the_bounds():
    equal = np.full(20, 0.4)
    found = mean(equal)
    assert (found.estimate, found.low, found.high) == (pytest.approx(0.4), None, None)
    unseen = wilson(0, 20)[1]
    found = mean(equal, bounds=(0, 1), kind="rate")
    assert ends(found) == pytest.approx((0.4 - unseen * 0.4, 0.4 + unseen * 0.6))
    assert ends(mean(np.zeros(20), bounds=(-1, 1), kind="rate")) == pytest.approx((-unseen, unseen))


def test_where_few_prompts_differ_rates_have_wilsons_interval():
    for count in (0, 1, 2):
        values = np.zeros(20)
        values[:count] = 1
        assert mean(values).low is None
        told, turned = (mean(one, bounds=(0, 1), kind="rate") for one in (values, 1 - values))
        assert ends(told) == pytest.approx(wilson(count, 20))
        assert ends(turned) == pytest.approx(wilson(20 - count, 20))
    values[:3] = 1
    assert mean(values).low is not None
    # one up, one down and a long way still to either bound
    values = np.zeros(20)
    values[:2] = 0.5, -0.25
    low, high = ends(mean(values, bounds=(-1, 1), kind="rate"))
    share_low, share_high = wilson(2, 20)
    fewer, unseen = share_low / 0.1, share_high - 0.1
    assert low == pytest.approx(0.025 * fewer - 0.0125 - unseen)
    assert high == pytest.approx(0.025 - 0.0125 * fewer + unseen)


def test_differences_that_are_equal_but_for_their_last_bits_are_equal():
    values = np.tile([0.6 - 0.4, 0.4 - 0.2], 10)
    assert len(set(values)) == 2
    assert mean(values).low is None
    assert ends(mean(values, bounds=(-1, 1), kind="rate")) == pytest.approx(
        ends(mean(np.full(20, 0.2), bounds=(-1, 1), kind="rate"))
    )


def test_a_share_that_is_almost_never_above_0_has_no_interval():
    """rep3 of ten answers, of which one repeats something: +0.009 [-0.303, +0.313] was told."""
    values = np.zeros(10)
    values[3] = 0.09
    found = mean(values, bounds=(-1, 1))
    assert (found.estimate, found.low, found.high) == (pytest.approx(0.009), None, None)
    assert found.method == "fewer than 3 prompts differ from the rest"
    # from three on the interval is about as wide as what was seen, and near the truth
    values[:3] = 0.05, 0.2, 0.1
    low, high = ends(mean(values, bounds=(-1, 1)))
    assert -0.05 < low < 0.044 < high < 0.25


def test_shares_of_which_most_are_0_are_covered():
    """0 but for a share 0.2 of prompts, there Beta(1, 9): the mean is 0.2 / 10."""
    draw = np.random.default_rng(40)
    covered = untold = 0
    for _ in range(400):
        one = mean((draw.random(20) < 0.2) * draw.beta(1, 9, 20), bounds=(-1, 1))
        untold += one.low is None
        covered += one.low is not None and holds(one, 0.02)
    assert covered / (400 - untold) > 0.95
    expected = stats.binom.cdf(2, 20, 0.2)  # fewer than three prompts above 0
    assert untold / 400 == pytest.approx(expected, abs=4 * math.sqrt(expected / 400))


def test_limits_do_not_pass_the_bounds():
    values = np.array([1.0] * 15 + [0.9, 0.8, 0.3, 0.2, 0.0])
    assert mean(values).high > 1
    assert mean(values, bounds=(0, 1)).high == 1
    assert mean(values, bounds=(0, 1)).low == mean(values).low


def test_resamples_without_spread_leave_the_interval_finite():
    values = np.zeros(50)
    values[:3] = 1, 2, 3  # one in twenty resamples is all zero
    low, high = ends(mean(values))
    assert -1 < low < 0.12 < high < 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_no_number_is_refused(bad):
    values = np.array([1.0] * 12 + [bad])
    for refused in [
        lambda: mean(values),
        lambda: bands(values[:, None]),
        lambda: best_set(values[:, None]),
        lambda: by_unit(values, list(range(13))),
        lambda: difference(values, np.zeros(13)),
        lambda: permutation_p(values, np.zeros(13)),
        lambda: p_null(1.0, values),
        lambda: p_null(bad, np.ones(3)),
        lambda: slopes(np.arange(13.0), values[None]),
    ]:
        with pytest.raises(RequestError, match="NaN or infinite"):
            refused()


def test_requests_that_make_no_sense_are_refused():
    ten = np.ones(10)
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(RequestError, match="level is"):
            mean(ten, level)
        with pytest.raises(RequestError, match="level is"):
            rate(ten > 0, level)
    for empty in (mean, rate):
        with pytest.raises(RequestError, match="no values"):
            empty(np.array([], bool if empty is rate else float))
    with pytest.raises(RequestError, match="no values"):
        p_null(1.0, np.array([]))
    with pytest.raises(RequestError, match=r"outside its bounds 0 and 0\.5"):
        mean(ten, bounds=(0, 0.5))
    with pytest.raises(RequestError, match="outside its bounds"):
        difference(2 * ten, ten, "rate")
    with pytest.raises(RequestError, match="unknown kind 'rates'; nearest: rate"):
        difference(ten, ten, "rates")
    with pytest.raises(RequestError, match="10 values of 9 units"):
        by_unit(ten, list(range(9)))


# rates and seeds


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("n", [10, 50])
def test_rate_is_wilsons(n, level):
    for successes in range(n + 1):
        found = rate(np.arange(n) < successes, level)
        assert ends(found) == pytest.approx(wilson(successes, n, level))
        assert found.estimate == successes / n and 0 <= found.low < found.high <= 1


def test_by_unit_averages_seeds_in_the_order_of_the_sorted_units():
    values = np.array([1.0, 2.0, 3.0, 5.0, 9.0])
    assert by_unit(values, ["b", "a", "b", "c", "a"]) == pytest.approx([5.5, 2.0, 5.0])
    assert by_unit(values, [10, 9, 10, 11, 9]) == pytest.approx([5.5, 2.0, 5.0])


def test_seeds_of_a_prompt_are_not_prompts():
    draw = np.random.default_rng(6)
    each = draw.normal(size=20)
    values, units = np.repeat(each, 5), np.repeat(np.arange(20), 5)
    assert mean(by_unit(values, units.tolist())) == mean(each)


def test_rate_by_unit_counts_what_the_seeds_are_worth():
    units = np.repeat(np.arange(20), 5).tolist()
    # every prompt answers all its seeds alike: 20 prompts, 6 successes, Student's quantile
    alike = rate_by_unit(np.repeat(np.arange(20) < 6, 5), units)
    z = stats.t.ppf(0.975, 19)
    p, n = 0.3, 20
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    assert ends(alike) == pytest.approx((centre - half, centre + half))
    # every prompt answers the same share: prompts are not known to differ, but no more than
    # their answers are counted
    for answers in ([True, True, False, False, False], [True, False]):
        p, n = float(np.mean(answers)), 20 * len(answers)
        even = rate_by_unit(np.tile(answers, 20), np.repeat(np.arange(20), len(answers)).tolist())
        half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
        assert even.high - even.low == pytest.approx(2 * half)
    # in between, p (1 - p) / variance of the estimate
    successes = np.random.default_rng(7).random((20, 5)) < np.linspace(0.1, 0.9, 20)[:, None]
    shares = successes.mean(1)
    p, n = shares.mean(), shares.mean() * (1 - shares.mean()) / stats.sem(shares) ** 2
    assert 25 < n < 95
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    found = rate_by_unit(successes.ravel(), units)
    assert found.high - found.low == pytest.approx(2 * half)
    assert found.n == 20 and found.estimate == pytest.approx(p)


def test_rate_by_unit_near_the_ends_counts_prompts():
    units = np.repeat(np.arange(30), 4).tolist()
    successes = np.zeros(120, bool)
    assert ends(rate_by_unit(successes, units)) == pytest.approx(wilson(0, 30))
    successes[:8] = True  # two prompts
    assert ends(rate_by_unit(successes, units)) == pytest.approx(wilson(2, 30))
    one_each = np.arange(30) < 11
    assert rate_by_unit(one_each, list(range(30))) == rate(one_each)


def test_rate_by_unit_covers_beta_binomial_answers():
    draw = np.random.default_rng(8)
    units = np.repeat(np.arange(30), 5).tolist()
    for p in (0.1, 0.5):
        chance = draw.beta(2 * p, 2 - 2 * p, (600, 30, 1))
        answers = draw.random((600, 30, 5)) < chance
        covered = np.mean([holds(rate_by_unit(one.ravel(), units), p) for one in answers])
        assert 0.93 <= covered <= 0.98
        pooled = np.mean([holds(rate(one.ravel()), p) for one in answers])
        assert pooled < 0.85  # seeds counted as though they were prompts


# differences and tests


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),  # Newcombe 1998
        ((1, 1, 7, 12), -0.507, -0.026),  # Fagerland, Lydersen and Laake 2017, chapter 8
        ((59, 6, 16, 80), -0.1186, -0.0046),  # the same; tests of R's contingencytables
    ],
)
def test_paired_rates_have_newcombes_interval(counts, low, high):
    a, b = table(*counts)
    found = difference(a, b, "rate")
    assert found.method == "paired Newcombe"
    assert ends(found) == pytest.approx((low, high), abs=6e-4 if abs(low) > 0.5 else 6e-5)
    swapped = difference(b.astype(float), a.astype(float), "rate")
    assert ends(swapped) == pytest.approx((-found.high, -found.low))


def test_paired_rates_at_the_ends_are_not_of_zero_width():
    a, b = table(0, 0, 0, 54)
    high = wilson(0, 54)[1]
    assert ends(difference(a, b, "rate")) == pytest.approx((-high, high))
    a, b = table(0, 20, 0, 0)
    found = difference(a, b, "rate")
    assert found.estimate == found.high == 1 and found.low < 0.85


def test_a_difference_of_means_is_the_mean_of_the_differences():
    draw = np.random.default_rng(9)
    a, b = draw.normal(size=20), draw.normal(size=20)
    assert difference(a, b) == mean(a - b)
    shares, others = draw.integers(0, 6, 20) / 5, draw.integers(0, 6, 20) / 5
    assert difference(shares, others, "rate") == mean(shares - others, bounds=(-1, 1))
    shares, others = np.zeros(20), np.eye(20)[0] / 5
    carried = mean(shares - others, bounds=(-1, 1), kind="rate")
    assert difference(shares, others, "rate") == carried and carried.low is not None
    with pytest.raises(RequestError, match="20 and 1 prompts are not paired"):
        interval.check_paired(a, b[:1])


def test_exact_p_is_mcnemars():
    for one, other in [(0, 0), (1, 0), (5, 5), (12, 2), (3, 40)]:
        a, b = table(7, one, other, 4)
        expected = stats.binomtest(one, one + other).pvalue if one + other else 1
        assert exact_p(a, b) == pytest.approx(expected)


def test_permutation_p_is_exact_for_few_and_close_for_many():
    draw = np.random.default_rng(10)

    def reference(a: np.ndarray, b: np.ndarray) -> float:
        return stats.permutation_test(
            (a, b), lambda x, y, axis: np.abs((x - y).mean(axis)), permutation_type="samples",
            alternative="greater", n_resamples=9_999, vectorized=True, rng=np.random.default_rng(0),
        ).pvalue  # fmt: skip

    for _ in range(3):
        a, b = draw.normal(0.6, size=10), draw.normal(size=10)
        assert permutation_p(a, b) == pytest.approx(reference(a, b))
        a, b = draw.normal(0.4, size=40), draw.normal(size=40)
        assert permutation_p(a, b) == pytest.approx(reference(a, b), abs=0.02)
    assert permutation_p(np.ones(5), np.ones(5)) == 1
    # zeros have no sign, and sums in another order are still ties
    a = np.array([0.1, 0.2, 0.3, 0.0, 0.0])
    assert permutation_p(a, np.zeros(5)) == 2 / 8
    assert permutation_p(np.full(40, 0.1), np.zeros(40)) == 1 / 10_000


def test_p_null_counts_the_observed_one_too():
    nulls = np.array([1.0, 2.0, 3.0, 4.0])
    assert p_null(3.0, nulls) == 3 / 5
    assert p_null(9.0, nulls) == 1 / 5
    assert p_null(0.0, nulls) == 1
    assert p_null(0.1 + 0.2, np.array([0.3])) == 1  # equal but for the last bits


# many cells


def correlated(draw: np.random.Generator, n: int, cells: int) -> np.ndarray:
    return (draw.normal(size=(n, 1)) + draw.normal(size=(n, cells))) / math.sqrt(2)


def test_bands_hold_all_together():
    draw = np.random.default_rng(11)
    together = alone = 0
    for _ in range(150):
        values = correlated(draw, 30, 15)
        together += all(holds(one, 0) for one in bands(values))
        alone += all(holds(mean(column), 0) for column in values.T[:6])
    assert 0.92 <= together / 150 <= 0.99
    assert alone / 150 < 0.9


def test_bands_of_skewed_cells_lean_as_their_studentised_bootstrap_does():
    values = np.random.default_rng(12).exponential(size=(30, 12))
    found = bands(values)
    centre, spread = values.mean(0), values.std(0, ddof=1)
    above = [(one.high - c) / s for one, c, s in zip(found, centre, spread, strict=True)]
    below = [(c - one.low) / s for one, c, s in zip(found, centre, spread, strict=True)]
    assert np.ptp(above) < 1e-9 and np.ptp(below) < 1e-9  # one critical value for all
    assert above[0] > 1.3 * below[0]
    # resample by resample with indices
    draw, n, extremes = np.random.default_rng(20), 30, []
    for _ in range(4_000):
        again = values[draw.integers(0, n, n)]
        own = np.sqrt(((n - 1) * again.var(0, ddof=1) + 0.5 * spread**2) / (n - 0.5))
        t = (again.mean(0) - centre) / own
        extremes.append((-t.min(), t.max()))
    assert above[0] == pytest.approx(np.quantile(extremes, 0.975, axis=0)[0], rel=0.06)
    assert below[0] == pytest.approx(np.quantile(extremes, 0.975, axis=0)[1], rel=0.04)
    for one, column in zip(found, values.T, strict=True):
        assert one.method.startswith("simultaneous") and one.n == 30 and one.level == 0.95
        assert one.high - one.low > mean(column).high - mean(column).low
        assert one.estimate == pytest.approx(column.mean())


def test_a_cell_in_which_few_prompts_differ_has_no_band_and_does_not_widen_the_others():
    values = np.random.default_rng(13).normal(size=(30, 6)).clip(-0.9, 0.9)
    found = bands(values)
    few = np.zeros((30, 3))
    few[:4, 1], few[:5, 2] = 0.5, 0.5
    more = bands(np.hstack([values, few[:, :2]]))
    assert more[:6] == found and more[6].low is more[7].low is None
    assert more[7].estimate == pytest.approx(0.5 * 4 / 30)
    assert bands(few)[2].low is not None
    told = bands(np.hstack([values, few[:, :2]]), bounds=(-1, 1), kind="rate")
    unseen = wilson(0, 30, 1 - 0.05 / 8)[1]
    assert ends(told[6]) == pytest.approx((-unseen, unseen)) and told[6].level == 0.95
    untold = bands(np.hstack([values, few[:, :2]]), bounds=(-1, 1))
    assert untold[6].low is untold[7].low is None  # no rates: the bounds are far from what they are
    assert told[:6] == found and told[7].method.startswith("simultaneous: Wilson")
    assert all(one.low is None for one in bands(few[:, :2]))


def test_bands_of_240_cells_are_quick_and_the_same_in_any_order():
    values = np.random.default_rng(14).normal(size=(50, 240))
    found = bands(values)
    assert len(found) == 240
    again = bands(values[:, ::-1])[::-1]
    assert [one.high for one in again] == pytest.approx([one.high for one in found])


def test_best_set_keeps_the_best_and_drops_what_is_clearly_worse():
    draw = np.random.default_rng(15)
    values = correlated(draw, 40, 6) - np.array([3, 0.1, 0, 3, 0.1, 1.5])
    found = best_set(values)
    assert found == sorted(found) and 2 in found and not {0, 3, 5} & set(found)
    assert best_set(values[:9]) == list(range(6))
    assert best_set(values[:, :1]) == [0]
    assert best_set(np.repeat(values[:, :1], 4, axis=1)) == [0, 1, 2, 3]
    assert best_set(values - 100 * (np.arange(6) != 3)) == [3]


def test_best_set_holds_one_of_equals_at_its_level():
    draw = np.random.default_rng(16)
    sets = [best_set(correlated(draw, 20, 6)) for _ in range(250)]
    assert 0.92 <= np.mean([0 in one for one in sets]) <= 0.99
    assert np.mean([len(one) for one in sets]) < 5.9  # and is not simply everything


@pytest.mark.parametrize("side", [1, -1])
def test_best_set_excludes_what_trails_by_more_than_the_critical_value(side):
    """Either the studentised bootstrap (side -1) or multivariate t (side 1) is the larger."""
    draw, n, cells = np.random.default_rng(21), 30, 4
    ahead = side * draw.exponential(size=(n, cells))
    ahead -= ahead.mean(0)
    spread = ahead.std(0, ddof=1)
    t, normal = [], []
    for _ in range(8_000):
        again = ahead[draw.integers(0, n, n)]
        own = np.sqrt(((n - 1) * again.var(0, ddof=1) + 0.5 * spread**2) / (n - 0.5))
        t.append((again.mean(0) / own).max())
    mixed = np.linalg.cholesky(np.corrcoef(ahead.T)) @ draw.normal(size=(cells, 8_000))
    normal = (mixed / np.sqrt(draw.chisquare(n - 1, 8_000) / (n - 1)) / math.sqrt(n)).max(0)
    both = np.quantile(t, 0.9), np.quantile(normal, 0.9)
    assert both[side == 1] > 1.1 * both[side == -1]
    for share, kept in [(0.94, True), (1.06, False)]:
        values = np.hstack([np.zeros((n, 1)), ahead])
        values[:, 1] += share * max(both) * spread[0]
        assert (0 in best_set(values, 0.9)) is kept


def test_best_set_excludes_nothing_on_few_prompts_that_differ():
    values = np.zeros((60, 2))
    values[:9, 1] = 1
    assert best_set(values) == [0, 1]
    values[:10, 1] = 1
    assert best_set(values) == [1]
    # ten prompts that all differ suffice: with a continuous score nine differ from the first
    draw = np.random.default_rng(17)
    values = draw.normal(size=(10, 2)) / 10 + [0, 1]
    assert best_set(values) == [1]


# slopes, and how an interval is said


def test_slopes_are_those_of_least_squares():
    draw = np.random.default_rng(18)
    x = np.array([-2.0, -1.0, 0.0, 1.0, 2.5])
    y = draw.normal(size=(30, 1)) * x + draw.normal(size=(30, 5)) + 7
    found = slopes(x, y)
    assert found == pytest.approx([np.polyfit(x, one, 1)[0] for one in y])
    both = steerability(x, y)
    assert both.slope == mean(found) and both.negative == rate(found < 0)
    with pytest.raises(RequestError, match="two different multipliers"):
        slopes(np.ones(5), y)


def test_an_interval_says_what_it_is():
    found = Interval(0.4234, 0.3121, 0.5512, 40, "Wilson")
    assert str(found) == "0.42 [0.31, 0.55]"
    assert json.loads(json.dumps(found.as_json())) == {
        "estimate": 0.4234, "low": 0.3121, "high": 0.5512,
        "n": 40, "method": "Wilson", "level": 0.95,
    }  # fmt: skip
    assert str(Interval(0.00123, 0.00111, 0.00142, 40, "")) == "0.00123 [0.00111, 0.00142]"
    assert str(Interval(1234.5, 1100.2, 1402.7, 40, "")) == "1234 [1100, 1403]"
    assert (
        str(Interval(0.42, None, None, 4, "fewer than 10 prompts")) == "0.42 (n = 4: no interval)"
    )
    assert str(mean(np.zeros(20))) == (
        "0.00 (n = 20, fewer than 3 prompts differ from the rest: no interval)"
    )
    assert json.dumps(mean(np.zeros(20)).as_json())


def test_the_coverage_script_measures_every_promise():
    script = Path(__file__).parents[2] / "scripts" / "benchmarks" / "intervals.py"
    done = subprocess.run(
        [sys.executable, str(script), "--simulations", "4", "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(one) for one in done.stdout.splitlines()]
    assert len(lines) > 70 and all(0 <= one["covers"] <= 1 for one in lines)
    exact = {one["law"]: one for one in lines if one["block"] == "rate" and one["n"] == 50}
    n, p = 50, 0.1
    weights = stats.binom.pmf(np.arange(n + 1), n, p)
    limits = [wilson(k, n) for k in range(n + 1)]
    covers = sum(w for w, (low, high) in zip(weights, limits, strict=True) if low <= p <= high)
    assert exact["p = 0.1"]["covers"] == pytest.approx(covers)
    assert exact["p uniform on (0, 1)"]["inside"]
