"""Layer and strength for a concept: the planted line wins, and held-out prompts come last."""

import json

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from interp_steer.engine.row import Sampling
from interp_steer.errors import RequestError, RunError
from interp_steer.steering.direction import Direction
from interp_steer.study.measured import beginnings
from interp_steer.tune.place import best_place, vertex
from tests.conftest import error

WORDS = ("rain", "Paris")
CHOOSE = [f"Say something about number {n}." for n in range(12)]
PROVE = [f"What follows the number {n}?" for n in range(20, 32)]
LINES = "add({bad,good,worse}, ? dose) at {1-2}"


@pytest.fixture(scope="module")
def directions(tiny):
    """One that raises the words among random ones."""
    rows = tiny.hf.lm_head.weight.detach()
    tokens = list(beginnings(tiny, WORDS))
    good = Direction.of(rows[tokens].mean(0) - rows.mean(0), "blocks.2.hook_resid_post", "good")
    return {
        "good": good,
        "bad": good.random(1).named("bad"),
        "worse": good.random(2).named("worse"),
    }


def found(tiny, directions, folder, **more):
    fields = {"prove": PROVE, "budgets": (0.01, 0.03), "rungs": (4,), "length": 6, "concept": WORDS,
              "choose_by": "concept_logprob", "controls": 19,
              "sampling": Sampling(temperature=1.0, max_new_tokens=8), **more}  # fmt: skip
    return best_place(tiny, LINES, CHOOSE, directions, folder, **fields)


@pytest.mark.slow
def test_the_planted_line_wins_and_is_tested_once(tiny, directions, tmp_path):
    place = found(tiny, directions, tmp_path)
    assert "good" in place.line and place.findings().verdict.steers
    cells = place.cells
    assert len(cells) == 6 * 2 and set(cells["budget"]) == {0.01, 0.03}
    # a third of the cells, and no fewer than three, went on to all prompts
    last = cells[cells["rung"] == 1]
    assert len(last) == 4 and set(last["n"]) == {12} and set(cells["n"]) == {4, 12}
    best = last.sort_values("effect").iloc[-1]
    assert best["line"].startswith("add(good") and place.line.startswith("add(good")
    assert 1 / 1.25 - 1e-6 <= place.strength / best["strength"] <= 1.25 + 1e-6
    # held-out prompts were read for one line and its controls alone
    plan = place.run.plan
    files = [*(tmp_path / "cells").rglob("rows.jsonl"), *(tmp_path / "tuned").rglob("rows.jsonl")]
    lines = [line for file in files for line in file.read_text().splitlines()[1:]]
    asked = {json.loads(line)["prompt"] for line in lines}
    assert not asked & set(PROVE)
    assert {one["role"] for one in plan} == {"unsteered", "chosen", "random"}
    assert any("largest of the budgets" in note for note in place.notes)
    before = {path: path.read_bytes() for path in tmp_path.rglob("rows.jsonl")}
    again = found(tiny, directions, tmp_path)
    assert again.line == place.line
    assert {path: path.read_bytes() for path in before} == before, "nothing is run twice"


@pytest.mark.slow
def test_what_loops_or_is_unlikely_cannot_win(tiny, directions, tmp_path, monkeypatch):
    from interp_steer.tune import place as module

    monkeypatch.setattr(module, "UNLIKELY", -10.0)
    with pytest.raises(RunError, match="less likely than unsteered text"):
        found(tiny, directions, tmp_path)


def test_no_line_that_meets_a_budget_is_said(tiny, directions, tmp_path):
    with pytest.raises(RunError, match="no line meets one of the budgets 90"):
        found(tiny, directions, tmp_path, budgets=(90.0,))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"budgets": ()}, "budgets are"),
        ({"budgets": (0.1, 0.1)}, "each once"),
        ({"prove": CHOOSE}, "asked in both selection and held out"),
    ],
)
def test_what_cannot_be_searched_is_refused(tiny, directions, tmp_path, more, expected):
    with pytest.raises(RequestError, match=expected):
        found(tiny, directions, tmp_path, **more)


@pytest.mark.parametrize("seed", range(5))
def test_the_peak_of_a_parabola_is_scipys(seed):
    draw = np.random.default_rng(seed)
    a, top, dose = -draw.uniform(0.5, 5), draw.uniform(-0.2, 0.2), draw.uniform(0.1, 1.0)

    def effect(d):
        return a * (np.log(d / dose) - top) ** 2 + 1

    doses = [dose / 1.25, dose, dose * 1.25]
    peak = minimize_scalar(lambda d: -effect(d), bounds=(dose / 3, dose * 3), method="bounded",
                           options={"xatol": 1e-10}).x  # fmt: skip
    assert vertex(doses, [effect(d) for d in doses]) == pytest.approx(peak, rel=1e-5)
    assert vertex(doses, [1.0, 1.0, 1.0]) is None and vertex(doses, [1.0, 0.0, 1.0]) is None


def test_the_command_refuses_what_it_cannot_search(tmp_path):
    (tmp_path / "p.txt").write_text("Why?\n")
    words = ["tune", "--steer", "add(joy, ? dose) at 3", "--prompts", tmp_path / "p.txt"]
    assert "give --concept" in error(2, *words, "--budgets", "0.1,0.2")
    prove = ["--prove", tmp_path / "p.txt", "--concept", "joy"]
    assert "expected such as 0.05" in error(2, *words, *prove, "--budgets", "much")
