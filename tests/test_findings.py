"""Findings from tables whose answers are known, and from a run by a second reckoning."""

import numpy as np
import pandas as pd
import pytest
import torch

from interp_steer import intervals
from interp_steer.cell import Controls
from interp_steer.direction import Direction
from interp_steer.findings import Findings
from interp_steer.item import Item
from interp_steer.study import Study

WORDS = [f"number {n}" for n in range(24)]


class Told:
    """A run that is only a table."""

    folder = "made by hand"

    def __init__(self, table, plan=None, **manifest):
        self._table = table
        self.plan = table.to_dict("records") if plan is None else plan
        self.manifest = {
            "metrics": ["length"], "choose_by": "length", "limits": {}, "cells": 1, "selected": 0,
            "prompts": {"choose": 12, "prove": 12}, **manifest,
        }  # fmt: skip

    def table(self):
        return self._table


def rows(role, values, split="prove", null=None, level="1.0", seeds=1, layer=3, **more):
    """One row a prompt (and seed) with given values."""
    return [
        {
            "role": role, "null": null, "split": split, "item": f"{split}{i}", "seed": s,
            "direction": "d", "operator": "add", "site": f"resid_post {layer}", "level": level,
            "scope": "all", "layer": layer, "coefficient": float(level), "dose": 0.1,
            "length": v, **more,
        }
        for i, v in enumerate(values)
        for s in range(seeds)
    ]  # fmt: skip


def found(*parts, **manifest):
    table = pd.DataFrame([row for part in parts for row in part])
    table["null"] = table["null"].astype("Int64")
    return Findings.of(Told(table, **manifest))


BEFORE = np.arange(12.0)
MOVED = np.array([3.0, 4, 5, 3, 4, 5, 3, 4, 5, 3, 4, 6])


def nulls(effects, role="random"):
    return [row for k, e in enumerate(effects) for row in rows(role, BEFORE + e, null=k)]


def test_the_effect_is_paired_with_its_interval():
    f = found(rows("unsteered", BEFORE), rows("chosen", BEFORE + MOVED), nulls([0.0] * 39))
    claim = f.claims.iloc[0]
    expected = intervals.mean(MOVED)
    assert (claim["effect"], claim["low"], claim["high"]) == pytest.approx(
        (expected.estimate, expected.low, expected.high)
    )
    assert claim["mean"] == pytest.approx((BEFORE + MOVED).mean())
    assert claim["unsteered"] == BEFORE.mean() and claim["n"] == 12
    assert f.verdict.p == 1 / 40 and f.verdict.steers is True


def test_p_counts_the_nulls_that_do_as_well():
    effects = [0.0] * 17 + [MOVED.mean(), MOVED.mean() + 1]
    f = found(rows("unsteered", BEFORE), rows("chosen", BEFORE + MOVED), nulls(effects))
    assert f.verdict.p == pytest.approx(3 / 20) and f.verdict.steers is False
    # against the good side only: nulls that move far the other way are no rivals
    f = found(rows("unsteered", BEFORE), rows("chosen", BEFORE + MOVED), nulls([-9.0] * 39))
    assert f.verdict.p == pytest.approx(1 / 40)


def test_a_chosen_cell_pays_for_the_choice():
    parts = rows("unsteered", BEFORE), rows("chosen", BEFORE + MOVED), nulls([0.0] * 39)
    many = found(*parts, cells=10)
    # too few to tell it from a lucky choice, though it beats all of them in its cell
    assert many.verdict.p == pytest.approx(10 / 40) and many.verdict.steers is None
    assert "Bonferroni over the 10 cells" in many.verdict.text
    beaten = found(*parts[:2], nulls([9.0] * 3 + [0.0] * 36), cells=10)
    assert beaten.verdict.steers is False and beaten.verdict.p == 1.0
    through = found(*parts, nulls([0.0] * 50, "null"), cells=10, selected=50)
    assert through.verdict.p == pytest.approx(1 / 51) and through.verdict.steers is True
    # nulls of which some found no cell within the limits count as having done worse
    some = found(*parts, nulls([9.0, 0.0], "null"), cells=10, selected=50)
    assert some.verdict.p == pytest.approx(2 / 51)


def test_few_prompts_give_points_and_no_verdict():
    f = found(rows("unsteered", BEFORE[:4]), rows("chosen", BEFORE[:4] + MOVED[:4]),
              nulls([0.0] * 39))  # fmt: skip
    assert f.claims["low"].isna().all() and f.verdict.steers is None
    assert f.claims["effect"].iloc[0] == MOVED[:4].mean()
    assert "fewer than 10 prompts" in f.verdict.text


def test_no_nulls_no_verdict():
    f = found(rows("unsteered", BEFORE), rows("chosen", BEFORE + MOVED))
    assert f.verdict.steers is None and "no random directions" in f.verdict.text


def test_an_effect_the_wrong_way_does_not_steer():
    f = found(rows("unsteered", BEFORE), rows("chosen", BEFORE - MOVED), nulls([-99.0] * 39))
    assert f.verdict.p == 1 / 40 and f.verdict.steers is False


def test_seeds_of_a_prompt_are_one_unit():
    once = found(rows("unsteered", BEFORE), rows("chosen", BEFORE + MOVED))
    five = found(rows("unsteered", BEFORE, seeds=5), rows("chosen", BEFORE + MOVED, seeds=5))
    columns = ["effect", "low", "high", "n"]
    pd.testing.assert_frame_equal(once.claims[columns], five.claims[columns])


def test_missing_is_left_out_and_told():
    after = BEFORE + MOVED
    after[[0, 5]] = np.nan
    f = found(rows("unsteered", BEFORE), rows("chosen", after))
    claim = f.claims.iloc[0]
    there = ~np.isnan(after)
    assert (claim["n"], claim["missing"]) == (10, 2)
    assert claim["effect"] == pytest.approx(MOVED[there].mean())
    assert claim["mean_missing_zero"] == pytest.approx(np.nan_to_num(after).mean())


def test_the_grid_has_simultaneous_bands_and_a_best_set():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(12, 3))
    parts = [rows("unsteered", BEFORE, "choose")]
    for k, effect in enumerate((0.0, 5.0, 5.1)):
        values = BEFORE + effect + noise[:, k]
        parts.append(rows("grid", values, "choose", level=str(k + 1.0), layer=k))
    f = found(*parts, cells=3)
    effects = np.array([0.0, 5.0, 5.1]) + noise
    expected = intervals.bands(effects)
    assert f.grid["effect"].to_list() == pytest.approx(effects.mean(0).tolist())
    assert f.grid["low"].to_list() == pytest.approx([e.low for e in expected])
    assert f.grid["best"].to_list() == [False, True, True]
    assert f.best_layers == (1, 2)
    assert f.verdict.steers is None  # nothing was run on prompts that prove


def test_slopes_are_those_of_numpy(tiny, tmp_path):
    vector = torch.randn(64, generator=torch.Generator().manual_seed(2))
    items = [Item(f"I love the {w}", positive=" tower", negative=" rain") for w in WORDS]
    study = Study(
        choose=[], prove=items, directions={"d": Direction.of(vector, "blocks.2.hook_resid_post")},
        sites=[2, 3], coefficients=["-0.2 dose", "-0.1 dose", "0.1 dose", "0.2 dose"],
        metrics="propensity", as_chat=False, controls=Controls(random=0, shuffled=0),
    )  # fmt: skip
    run = study.run(tiny, tmp_path)
    f = run.findings()
    table = run.table()
    grid = table[table["role"] == "grid"]
    base = table[table["role"] == "unsteered"].set_index("item")["propensity"]
    for line in f.slopes.to_dict("records"):
        mine = grid[grid["site"] == line["site"]]
        each = []
        for item, part in mine.groupby("item"):
            x = [*part["dose"], 0.0]
            y = [*part["propensity"], base[item]]
            each.append(np.polyfit(x, y, 1)[0])
        assert line["slope"] == pytest.approx(np.mean(each), abs=1e-5)
        assert line["negative"] == pytest.approx(np.mean(np.array(each) < 0))
        assert line["n"] == len(WORDS) and line["per"] == "dose"
    assert len(f.slopes) == 2
    assert "no prompts chose" in f.verdict.text
    assert str(f).startswith("Nothing is declared")
