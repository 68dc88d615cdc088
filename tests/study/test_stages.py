"""The choice among cells: of equal ones the gentlest, by strengths of one kind; what nulls find."""

import pytest

from interp_steer.engine.row import Sampling
from interp_steer.prompts.item import Item
from interp_steer.steering.scale import Scale
from interp_steer.study.cell import Cell, Controls
from interp_steer.study.metrics import METRICS, metric
from interp_steer.study.stages import _gentlest, choose
from tests.study.test_execution import study

SCALE = Scale((10.0, 10.0, 20.0, 40.0))


def row(dose=None, coefficient=1.0, delta=1.0, layer=0, component="resid_post"):
    return {"dose": dose, "coefficient": coefficient, "delta": delta, "layer": layer,
            "component": component}  # fmt: skip


@pytest.mark.parametrize(
    ("operators", "rows", "wins"),
    [
        ("add", [row(0.4), row(0.2), row(0.3)], 1),
        ("add", [row(-0.4), row(0.5)], 0),
        # one dose at several layers is the same but for the last bits
        ("add", [row(0.4 + 1e-16), row(0.4), row(0.4 - 1e-16)], 0),
        # a dose of 0.4 against an activation of 0.3, whose step is as long as the stream
        ("latent_clamp add", [row(None, 0.3, delta=10.0), row(0.4, 4.0, delta=4.0)], 1),
        # the other way about: an activation of 120 that moves hardly at all
        ("add latent_clamp", [row(0.4, 4.0, delta=4.0), row(None, 120.0, delta=0.5)], 1),
        # a clamp to 0.1 that turns a long component down
        ("clamp add", [row(0.1, 1.0, delta=9.0), row(0.4, 4.0, delta=4.0)], 1),
        ("ablate add", [row(0.0, 0.0, delta=9.0), row(0.4, 4.0, delta=4.0)], 1),
        # activations of two features, at layers where the stream has another length
        ("latent_clamp", [row(None, 1.0, 8.0, layer=0), row(None, 9.0, 12.0, layer=2)], 1),
        # heads' outputs have no dose and no common length
        ("add", [row(None, 3.0, component="z"), row(None, 2.0, component="z")], 1),
        # where one cannot be compared the first of the grid wins
        ("add clamp", [row(0.4), row(0.1, 1.0, None)], 0),
        ("add clamp", [row(0.4), row(None, 1.0, 0.1, component="z")], 0),
        ("add", [{}, row(0.1)], 0),
    ],
)
def test_of_equal_cells_the_gentlest_wins_by_strengths_of_one_kind(operators, rows, wins):
    every = operators.split() * 3
    cells = [Cell("grid", "d", every[i], level=str(i)) for i in range(len(rows))]
    assert _gentlest(cells, rows, SCALE) is cells[wins]
    assert _gentlest([], [], SCALE) is None


@pytest.fixture
def marking():
    """A metric by which every steered row is the same, and one that random directions fail."""

    @metric("steered")
    def steered(measured):
        return [float(bool(r.steer)) for r in measured.rows]

    @metric("own", kind="rate")
    def own(measured):
        return [
            float(not any("random" in d.name for one in r.steer for d in one.directions))
            for r in measured.rows
        ]

    yield
    del METRICS["steered"], METRICS["own"]


def test_a_tie_between_a_clamp_and_an_addition_goes_to_what_moves_less(tiny, tmp_path, marking):
    made = study(
        sites=[2], coefficients=["0.5 dose"], operators=["add", "ablate"], scopes=["prompt"],
        metrics=["steered", "length"], choose_by="steered",
        controls=Controls(0, 0, 0, flip=False, wrong_layer=False),
        sampling=Sampling(max_new_tokens=2),
    )  # fmt: skip
    table = made.run(tiny, tmp_path).table()
    grid = table.query("role == 'grid'").groupby("operator")["delta"].mean()
    assert grid["ablate"] < grid["add"]  # a random direction is hardly in the stream
    assert set(table.query("role == 'chosen'")["operator"]) == {"ablate"}
    # and not because it has no coefficient
    known = made.run(tiny, tmp_path).rows
    bound = made.bound(tiny)
    stronger = {key: {**one, "delta": 99.0} if "ablate" in (one["steer"] or "") else one
                for key, one in known.items()}  # fmt: skip
    scale = bound.scale(tiny)
    assert choose(bound, tiny, bound.grid(scale), stronger, scale).operator == "add"


def test_null_directions_that_all_break_the_limits_were_run(tiny, tmp_path, marking):
    words = ["fox", "dog", "tower", "rain", "mountain", "fruit", "brown", "lazy", "quick", "happy"]
    made = study(
        prove=[Item(f"I hate the {w}", positive=" tower", negative=" rain") for w in words],
        choose=[Item(f"I love the {w}", positive=" tower", negative=" rain") for w in words[:2]],
        as_chat=False, sites=[1, 2], coefficients=["0.5 dose"],
        metrics=["logit_difference", "own"], choose_by="logit_difference", limits={"own": 0.5},
        controls=Controls(0, 0, 0, flip=False, wrong_layer=False, selected=4),
        sampling=Sampling(max_new_tokens=2),
    )  # fmt: skip
    run = made.run(tiny, tmp_path)
    roles = set(run.table()["role"])
    assert "null_grid" in roles and "chosen" in roles and "null" not in roles
    verdict = run.findings().verdict
    assert verdict.p == pytest.approx(1 / 5)
    said = "4 random directions made the same choice among 2 settings, of which none"
    assert said in verdict.text
