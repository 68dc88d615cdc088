"""Cells: their strength in every form, how they are shown; and the controls beside them."""

import pytest

from interp_steer.errors import RequestError
from interp_steer.steering.grammar import parse
from interp_steer.steering.intervention import resolve
from interp_steer.study.cell import Cell, Controls
from tests.study.samples import SCALE, direction


def cell(line):
    return Cell("grid", steer=resolve(parse(line, {"d": direction()}), SCALE))


def test_a_strength_is_the_mean_over_sites():
    doses = cell("add(d, 0.5 dose) at 1; add(d, 0.25 dose) at 3")
    norms = [SCALE.medians[2], SCALE.medians[4]]
    expected = (0.5 * norms[0] + 0.25 * norms[1]) / 2
    assert doses.strength("dose", SCALE) == pytest.approx(0.375)
    assert doses.strength("coefficient", SCALE) == pytest.approx(expected)
    length = cell("add(d, 6) at 1-2")
    expected = (6 / SCALE.medians[2] + 6 / SCALE.medians[3]) / 2
    assert length.strength("dose", SCALE) == pytest.approx(expected)
    assert length.strength("coefficient", SCALE) == 6.0
    # the direction is no feature: no site has a largest activation
    assert length.strength("max", SCALE) is None
    assert Cell("unsteered").strength("coefficient", SCALE) is None


def test_a_site_without_a_strength_leaves_the_cell_without_one():
    assert cell("add(d, 6) at 1").strength("coefficient", SCALE) == 6.0
    assert cell("add(d, 6) at 1; ablate(d) at 2").strength("max", SCALE) is None


def test_a_cell_is_shown_as_it_is_declared():
    assert str(Cell("unsteered")) == "unsteered"
    assert str(Cell("grid", "d", "add", "resid_post 1", "0.5 dose", "all")) == (
        "add(d, 0.5 dose) at resid_post 1"
    )
    assert str(Cell("grid", "d", "ablate", "resid_post 1", "", "prompt")) == (
        "ablate(d) at resid_post 1 on prompt"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"random": -1}, "random is -1, expected 0 to 10000"),
        ({"shuffled": 10_001}, "shuffled is 10001, expected 0 to 10000"),
    ],
)
def test_controls_that_cannot_be_run_are_told(given, said):
    with pytest.raises(RequestError, match=f"^controls: {said}$"):
        Controls(**given)
