"""Shares of an effect: ratios of means over prompts, and when there are none."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from interp_steer.causal.patch import Patching
from interp_steer.causal.trace import Mediation
from interp_steer.errors import RequestError
from interp_steer.stats import intervals, shares
from interp_steer.stats.shares import ratio

EFFECT = [0.01, 1.0, 2.0, 2.5, 3.0, 1.5]  # nats, of six prompts; nearly none on the first


def mediated(effect, parts: dict[tuple[str, int], list[float]], score: str = "words") -> Mediation:
    """A table in which each part takes the given share of the effect on each prompt."""
    rows = [
        (component, layer, None, f"p{n}", score, -8.0, -8.0 + e, -8.0 + e - s * e)
        for (component, layer), taken in parts.items()
        for n, (e, s) in enumerate(zip(effect, taken, strict=True))
    ]
    columns = ["component", "layer", "head", "item", "score", "unsteered", "steered", "restored"]
    return Mediation(pd.DataFrame(rows, columns=columns).astype({"head": "Int64"}))


def test_a_share_is_a_ratio_of_means_not_a_mean_of_ratios():
    """The prompt with hardly any effect has a ratio of 22.6, and would decide the mean alone."""
    ratios = [22.6, -0.92, -0.04, -0.18, -0.15, -0.64]
    assert np.mean(ratios) == pytest.approx(3.445)
    found = mediated(
        EFFECT,
        {
            ("attn_out", 29): ratios,
            ("mlp_out", 22): [0.5, 1.1, 0.9, 1.0, 1.05, 0.966],
            ("attn_out", 20): [0.9, 0.5, 0.4, 0.5, 0.6, 0.7],
        },
    )
    summary = found.summary()
    assert list(summary["layer"]) == [22, 20, 29]  # by means of ratios it is 29 first
    # (0.005 + 1.1 + 1.8 + 2.5 + 3.15 + 1.449) / 10.01, and (0.226 - 0.92 - ... - 0.96) / 10.01
    expected = [10.004 / 10.01, 5.409 / 10.01, -2.634 / 10.01]
    assert list(summary["estimate"]) == pytest.approx(expected)
    assert list(summary["effect"]) == pytest.approx([10.01 / 6] * 3)
    assert summary["low"].isna().all() and set(summary["interval"]) == {"fewer than 10 prompts"}
    assert set(summary["score"]) == {"words"} and (summary["n"] == 6).all()
    assert found.warning == (
        "the effect on words is +1.67 nats, and with 6 prompts nothing tells it from 0: shares are "
        "points without intervals (from 10 prompts on there are some)"
    )
    assert "share" not in found.table and "normalised" not in found.table


def test_what_patching_brings_back_is_a_ratio_of_means():
    rows = [("mlp_out", 3, None, 1, " a", "p", "logit_difference", 2.0, -2.0, 0.0)]
    rows += [("mlp_out", 3, None, 1, " a", "q", "logit_difference", 0.0, -0.002, 0.4)]
    columns = ["component", "layer", "head", "position", "token", "item", "score"]
    table = pd.DataFrame(rows, columns=[*columns, "clean", "corrupt", "value"])
    (row,) = Patching(table.astype({"head": "Int64"})).summary().to_dict("records")
    assert row["estimate"] == pytest.approx((2.0 + 0.402) / (4.0 + 0.002))  # not (0.5 + 201) / 2
    assert (row["position"], row["score"], row["n"]) == (1, "logit_difference", 2)


def samples(draw, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A share of 0.3 of a skewed effect, with noise of its own."""
    whole = np.exp(0.5 * draw.normal(size=n))
    return 0.3 * whole + 0.3 * draw.normal(size=n), whole


def test_at_both_ends_of_the_interval_nothing_is_left_of_the_other_part():
    part, whole = samples(np.random.default_rng(1), 40)
    found = ratio(part, whole)
    assert found.estimate == pytest.approx(part.sum() / whole.sum()) and found.n == 40
    for end in (found.low, found.high):  # Fieller's ends, or further out where the bootstrap's are
        assert 0.02 < stats.ttest_1samp(part - end * whole, 0).pvalue <= 0.05 + 1e-9
    turned = ratio(-part, -whole)
    assert (turned.low, turned.high) == pytest.approx((found.low, found.high), rel=1e-3)
    paired = ratio(part[::-1].copy(), whole)  # pairing counts: noise no longer cancels
    assert paired.high - paired.low > 1.2 * (found.high - found.low)


def test_of_a_constant_whole_it_is_the_interval_of_the_mean():
    part = np.random.default_rng(2).exponential(size=30)
    one, other = ratio(part, np.full(30, 4.0)), intervals.mean(part)
    assert (one.low, one.high) == pytest.approx((other.low / 4, other.high / 4))


@pytest.mark.parametrize("n", [12, 30])
def test_coverage(n):
    draw = np.random.default_rng(5)
    found = [ratio(*samples(draw, n)) for _ in range(300)]
    told = [one for one in found if one.low is not None]
    assert len(told) > 290
    assert 0.92 < np.mean([one.low <= 0.3 <= one.high for one in told]) <= 0.99


def test_an_effect_that_is_not_told_from_0_has_no_interval_and_a_warning():
    draw = np.random.default_rng(3)
    effect = draw.normal(0.1, 1.0, size=20)
    assert stats.ttest_1samp(effect, 0).pvalue > 0.05
    found = mediated(effect, {("mlp_out", 3): [0.5] * 10 + [0.6] * 10})
    (row,) = found.summary().to_dict("records")
    assert math.isnan(row["low"]) and row["interval"] == "the whole cannot be told from 0"
    assert row["effect_low"] < 0 < row["effect_high"]
    assert "cannot be told from 0: shares of it mean nothing" in found.warning
    clear = mediated(effect + 3, {("mlp_out", 3): [0.5] * 10 + [0.6] * 10})
    assert clear.warning is None and 0.5 < clear.summary()["low"][0] < 0.6
    tiny = mediated([4e-4] * 12, {("mlp_out", 3): [0.5] * 12})
    assert "no more than rounding" in tiny.warning
    (row,) = tiny.summary().to_dict("records")
    assert math.isnan(row["estimate"]) and row["interval"] == "no effect"


def test_items_given_twice_and_missing_values_are_no_evidence():
    table = pd.DataFrame({"layer": [0] * 4 + [1], "item": ["a", "a", "b", "c", "a"]})
    part = pd.Series([1.0, 3.0, 4.0, np.nan, np.inf])
    whole = pd.Series([4.0, 4.0, 8.0, 1.0, 1.0])
    found = shares.summarised(table, ["layer"], part, whole)
    assert found["estimate"][0] == 0.5 and math.isnan(found["estimate"][1])  # (2 + 4) / (4 + 8)
    assert list(found["n"]) == [2, 0] and list(found["missing"]) == [1, 1]


def test_errors():
    one = np.ones(12)
    for part, whole, said in (
        (one, np.ones(11), "12 and 11 prompts are not paired"),
        (one, np.zeros(12), "mean of the whole is 0"),
        (one, np.full(12, np.nan), "NaN or infinite"),
    ):
        with pytest.raises(RequestError, match=said):
            ratio(part, whole)
