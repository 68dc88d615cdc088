"""The choice among cells, of equal ones the gentlest; the controls; what random directions find."""

import pytest
import torch

from interp_steer.engine.row import Sampling
from interp_steer.prompts.item import Item
from interp_steer.steering.contrast import Contrast
from interp_steer.steering.scale import Scale
from interp_steer.study.cell import Cell, Controls
from interp_steer.study.metrics import METRICS, metric
from interp_steer.study.plan import forecast
from interp_steer.study.stages import _gentlest, choose, controlled
from tests.study.samples import SCALE, four_cells, study

SHORT = Scale((10.0, 10.0, 20.0, 40.0))


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
    assert _gentlest(cells, rows, SHORT) is cells[wins]
    assert _gentlest([], [], SHORT) is None


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


def test_nulls_through_the_choice_choose_for_themselves(tiny, tmp_path):
    made = study(controls=Controls(2, 0, 0, selected=3))
    table = made.run(tiny, tmp_path / "r").table()
    nulls = table.query("role == 'null_grid'")
    assert len(nulls) == 3 * 6 * 3
    for number in range(3):
        mine = nulls[nulls["null"] == number].groupby(["site", "level"])["kl_mean"].mean()
        then = table[(table["role"] == "null") & (table["null"] == number)]
        assert len(then) == 4 and set(zip(then["site"], then["level"], strict=True)) == {
            mine.idxmin()
        }
    assert sum(forecast(made).values()) == len(table)


def test_controls_of_a_contrastive_direction():
    g = torch.Generator().manual_seed(1)
    contrast = Contrast(torch.randn(6, 4, 64, generator=g), torch.randn(6, 4, 64, generator=g))
    made = four_cells(directions={"d": contrast}, controls=Controls(random=3, shuffled=2))
    cells = controlled(made, ("d", "add", "resid_post 1", "0.5 dose", "all"), SCALE, 6)
    assert [c.role for c in cells] == [
        "chosen", "flip", "wrong_layer", *["random"] * 3, *["shuffled"] * 2,
    ]  # fmt: skip
    own = cells[0].steer[0]
    assert cells[1].steer[0].value == -own.value
    assert cells[1].steer[0].directions == own.directions
    wrong = cells[2].steer[0]
    assert wrong.sites[0].layer == 4 and wrong.value == 0.5 * 15.0  # the same dose, there
    assert torch.equal(wrong.directions[0].unit, own.directions[0][1].unit)  # layer 1's own vector
    vectors = [c.steer[0].directions[0][1] for c in cells[3:]]
    assert all(c.steer[0].value == own.value for c in cells[3:])
    assert len({v.sha for v in vectors}) == 5
    for vector in vectors[:3]:
        assert vector.norm == own.directions[0][1].norm
    expected = contrast.shuffled(1).directions()[1].unit
    assert torch.equal(vectors[4].unit, expected)


def test_raw_coefficients_are_caas_own_and_the_controls_are_as_long():
    g = torch.Generator().manual_seed(3)
    positive, negative = torch.randn(6, 5, 64, generator=g) + 1, torch.randn(6, 5, 64, generator=g)
    made = four_cells(
        directions={"caa": Contrast(positive, negative, {})},
        sites="each 1-3",
        coefficients=["-2 raw", "1 raw"],
        controls=Controls(random=1, features=0, shuffled=2),
    )
    lengths = (positive.mean(1) - negative.mean(1)).norm(dim=-1)
    wanted = [c * lengths[layer].item() for layer in (1, 2, 3) for c in (-2, 1)]
    assert [cell.steer[0].value for cell in made.grid(SCALE)] == pytest.approx(wanted, rel=1e-5)
    assert [s[3] for s in made.settings[:2]] == ["-2.0 raw", "1.0 raw"]
    cells = controlled(made, made.settings[0], SCALE, n_layers=6)
    values = {}
    for cell in cells:
        values.setdefault(cell.role, set()).add(cell.steer[0].value)
    own = made.grid(SCALE)[0].steer[0].value
    # shuffled differences are shorter: a multiple of their own length would be no control
    shuffled = made.shuffled({"caa": made.directions["caa"]}, 0)["caa"]
    assert shuffled[1].norm < 0.9 * lengths[1]
    assert values == {
        "chosen": {own}, "flip": {-own}, "wrong_layer": {own}, "random": {own}, "shuffled": {own},
    }  # fmt: skip
    line = f"add(caa, 1 raw) at 2-3; add(caa, {own}) at 1"
    lined = four_cells(directions=made.directions, lines=[line], sites=())
    first = lined.grid(SCALE)[0].steer
    assert [one.value for one in first] == pytest.approx([*lengths[2:4].tolist(), own], rel=1e-5)
