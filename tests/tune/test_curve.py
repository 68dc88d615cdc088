"""The dose at which a curve crosses a target, against SciPy's root finder on made-up curves."""

import math

import pytest
from scipy.optimize import brentq

from interp_steer.tune.curve import DOSES, Curve


def made(a, power, cap):
    """A curve as KL has it: dose squared at first, then flat."""
    return lambda d: cap * (1 - math.exp(-((a * d * d / cap) ** (power / 2))))


def followed(function, target, identity=True, doses=DOSES):
    """The curve once it is settled, and in how many batches; the first is the grid."""
    curve = Curve(target, identity)
    curve.add({d: function(d) for d in doses})
    batches = 1
    while (dose := curve.next) is not None:
        curve.add({dose: function(dose)})
        batches += 1
        assert batches < 20
    return curve, batches


@pytest.mark.parametrize("a", [0.3, 1.5, 8, 30])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("cap", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("target", [0.05, 0.2, 0.5])
def test_the_target_is_met_in_few_batches(a, power, cap, target):
    function = made(a, power, cap)
    curve, batches = followed(function, target)
    if function(DOSES[0]) >= target:
        assert curve.outcome in ("above", "ok") and curve.next is None
    elif function(DOSES[-1]) < target:
        assert curve.outcome == "below" and curve.best is None
    else:
        assert curve.outcome == "ok" and batches <= 3 and curve.monotone
        assert abs(function(curve.best) / target - 1) <= 0.1
        root = brentq(lambda d: math.log(function(d) / target), *DOSES[::8])
        assert abs(math.log(curve.best / root)) < 0.2


def test_the_lowest_crossing_is_taken_and_others_are_told():
    bumps = {0.02: 0.01, 0.05: 0.1, 0.1: 0.6, 0.2: 0.1, 0.3: 0.7, 0.45: 0.2}
    curve = Curve(0.3)
    curve.add(bumps)
    assert curve.bracket == (0.05, 0.1) and curve.crossings == [(0.05, 0.1), (0.2, 0.3)]
    assert not curve.monotone and 0.05 < curve.next < 0.1


def test_what_does_something_at_0_is_told_from_a_small_dose_that_does_too_much():
    for identity, outcome in ((True, "above"), (False, "no zero")):
        curve, batches = followed(lambda d: 5 + d, 0.2, identity)
        assert (curve.outcome, batches, curve.best) == (outcome, 1, None)


def test_a_jump_ends_where_doses_are_told_apart():
    curve, batches = followed(lambda d: 1e-3 if d < 0.2345 else 5.0, 0.2)
    assert curve.outcome == "steep" and batches < 20
    low, high = curve.bracket
    assert low < 0.2345 <= high < 1.02 * low


def test_a_smallest_dose_that_meets_it_is_taken():
    curve, _ = followed(lambda d: 0.21 + d / 100, 0.2)
    assert (curve.outcome, curve.best) == ("ok", 0.02)
    curve, _ = followed(lambda d: 0.0, 0.2)
    assert curve.outcome == "below"


def test_an_end_that_stays_loses_weight():
    """A curve so bent that the secant creeps; without Illinois it takes more rounds."""
    function = made(30, 4.0, 8.0)
    curve, batches = followed(function, 5e-3, doses=(0.001, 1.1))
    assert curve.outcome == "ok" and batches <= 8
