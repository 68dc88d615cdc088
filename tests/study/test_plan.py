"""What a study will cost, and what it says of itself before it runs."""

import pytest

from interp_steer.errors import RequestError
from interp_steer.steering.direction import Direction
from interp_steer.study.cell import Controls
from interp_steer.study.plan import Plan
from tests.study.samples import direction, four_cells, study


def test_the_plan_says_where_a_coefficient_hardly_steers(tiny):
    median = four_cells(as_chat=False).scale(tiny).medians
    small, edge = 0.019 * min(median[2:4]), 0.021 * max(median[2:4])

    def notes(*coefficients, **changes):
        made = four_cells(coefficients=coefficients, as_chat=False, **changes)
        told = Plan.of(made, tiny, timed=False).notes
        return [note for note in told if "hardly steer" in note]

    (said,) = notes(small, edge, "0.001 dose")
    assert f"{small:g} is 1." in said and f"{edge:g}" not in said and "0.001" not in said
    weak = {"directions": {"d": 0.001 * direction()}}
    (said,) = notes("-1 raw", **weak)
    assert "-1 raw is 0." in said
    assert notes(edge) == notes("0.001 dose") == notes(0) == []
    # a clamp to a small value takes the concept out, which is no small step
    assert notes(small, operators=["clamp"]) == []
    assert notes(lines=[f"add(d, {small}) at 2"], sites=())


def test_the_plan_tells_rows_and_time(tiny):
    made = Plan.of(study(), tiny)
    assert made.rows == {"unsteered": 7, "grid": 18, "prove": 24}
    assert made.chunks == {"unsteered": 1, "grid": 3, "prove": 4}
    assert made.seconds is not None and made.seconds > 0
    assert made.memory > made.weights > 0


def test_controls_that_cannot_be_had_are_told_before_anything_runs(tiny, tmp_path):
    source = {"release": "r", "sae_id": "s", "index": "5", "neuronpedia": "nobody/3-res/5"}
    vector = direction().vector
    one = Direction.of(vector, "blocks.2.hook_resid_post", "f", source)
    with pytest.raises(RequestError, match=r"nothing is known of the density.*features: 0"):
        study(directions={"f": one}, controls=Controls(1, 2, 0)).run(tiny, tmp_path / "a")
    assert not (tmp_path / "a").exists()
