"""Findings from tables whose answers are known, and from a run by a second reckoning."""

import numpy as np
import pandas as pd
import pytest
import torch

from interp_steer.prompts.item import Item
from interp_steer.report.findings import STATES, Findings
from interp_steer.stats import intervals, simultaneous
from interp_steer.steering.direction import Direction
from interp_steer.study.cell import Controls
from interp_steer.study.study import Study

WORDS = [f"number {n}" for n in range(24)]


class Told:
    """A run that is only a table."""

    def __init__(self, table, plan=None, **manifest):
        self._table = table
        self.plan = table.to_dict("records") if plan is None else plan
        self.manifest = {
            "metrics": ["length"], "choose_by": "length", "limits": {}, "cells": 1, "selected": 0,
            "prompts": {"choose": 12, "prove": 12}, **manifest,
        }  # fmt: skip

    def findings(self):
        return Findings.of(self._table, self.manifest, self.plan)


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
    return Told(table, **manifest).findings()


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
    assert "Bonferroni over the 10 settings" in many.verdict.text
    beaten = found(*parts[:2], nulls([9.0] * 3 + [0.0] * 36), cells=10)
    assert beaten.verdict.steers is False and beaten.verdict.p == 1.0
    through = found(*parts, nulls([0.0] * 50, "null"), cells=10, selected=50)
    assert through.verdict.p == pytest.approx(1 / 51) and through.verdict.steers is True
    # nulls of which some found no cell within the limits count as having done worse
    some = found(*parts, nulls([9.0, 0.0], "null"), cells=10, selected=50)
    assert some.verdict.p == pytest.approx(2 / 51)


def test_nulls_that_all_broke_the_limits_did_worse():
    parts = rows("unsteered", BEFORE), rows("chosen", BEFORE + MOVED)
    f = found(*parts, cells=4, selected=20, limits={"length": -5.0})
    assert f.verdict.p == pytest.approx(1 / 21) and f.verdict.steers is True
    assert "20 random directions made the same choice among 4 settings" in f.verdict.text
    assert "of which none found one within the limits" in f.verdict.text
    assert "no random directions were run" not in str(f)
    (line,) = f.p.to_dict("records")
    assert (line["control"], line["n"], line["p"]) == ("null", 20, pytest.approx(1 / 21))
    assert np.isnan(line["mean"]) and "nan" not in str(f)
    few = found(*parts, cells=4, selected=9, limits={"length": -5.0})
    assert few.verdict.p == pytest.approx(1 / 10) and few.verdict.steers is False


@pytest.mark.parametrize("role", ["null", "random"])
def test_a_null_without_a_value_was_run(role):
    parts = rows("unsteered", BEFORE), rows("chosen", BEFORE + MOVED)
    lost = [row for k in range(4) for row in rows(role, BEFORE * np.nan, null=9 + k)]
    told = {"cells": 3, "selected": 13} if role == "null" else {}
    f = found(*parts, nulls([0.0] * 8 + [99.0], role), lost, **told)
    assert f.verdict.p == pytest.approx(2 / 14)  # of 13, one did as well
    assert f.p.iloc[0]["n"] == 13 and f.p.iloc[0]["mean"] == pytest.approx(11)
    assert f"4 of 13 {role} directions have no value in length" in str(f)
    # without effect, which is as well where the chosen cell moves the wrong way
    worse = found(rows("unsteered", BEFORE), rows("chosen", BEFORE - 1 - MOVED / 9),
                  nulls([-5.0] * 9, role), lost, **told)  # fmt: skip
    assert worse.verdict.p == pytest.approx(5 / 14)


def test_nulls_whose_rows_are_missing_count_as_doing_as_well():
    parts = [*rows("unsteered", BEFORE), *rows("chosen", BEFORE + MOVED)]
    table = pd.DataFrame([*parts, *nulls([0.0] * 30, "null")])
    table["null"] = table["null"].astype("Int64")
    plan = [*parts, *nulls([0.0] * 39, "null")]  # nine were not run yet
    f = Told(table, plan, cells=3, selected=39).findings()
    assert f.verdict.p == pytest.approx(10 / 40) and f.verdict.steers is False
    assert "9 of them are not measured and count as doing as well" in f.verdict.text


def test_no_value_of_the_metric_that_decides_is_said_so():
    lost = rows("chosen", BEFORE * np.nan)
    f = found(rows("unsteered", BEFORE), lost, nulls([0.0] * 39))
    assert f.verdict.steers is None and f.chosen is not None
    assert "no prompt has a value of length" in f.verdict.text
    assert "no random directions" not in f.verdict.text + f.verdict.how
    f = found(rows("unsteered", BEFORE * np.nan), rows("chosen", BEFORE), nulls([0.0] * 39))
    assert "no prompt has a value of length" in f.verdict.text


def test_how_many_did_as_well_in_the_same_cell_is_said():
    f = found(rows("unsteered", BEFORE), rows("chosen", BEFORE + MOVED),
              nulls([99.0] + [0.0] * 38), cells=10)  # fmt: skip
    assert f.verdict.p == pytest.approx(0.5) and f.verdict.steers is None
    assert "1 of 39 random directions in the same setting did as much" in f.verdict.text


@pytest.mark.parametrize(
    ("steps", "manifest", "state", "says"),
    [
        ((), {"cells": 2}, "begun", "no steered row was run yet"),
        (("half",), {"cells": 2}, "unfinished", "rows of the grid are missing"),
        (("half",), {"cells": 2, "limits": {"length": 99.0}}, "unfinished", "rows of the grid"),
        (("grid",), {"cells": 2}, "waiting", "the chosen setting was not run yet"),
        (
            ("grid",),
            {"cells": 2, "limits": {"length": 3.0}},
            "waiting",
            "chosen setting was not run",
        ),
        (("grid",), {"cells": 2, "limits": {"length": 99.0}}, "beyond", "stayed within the limits"),
        (("grid", "chosen"), {"cells": 2}, "chosen", "no random directions were run"),
        (("prove",), {"cells": 2, "choose": 0}, "open", "no selection prompts"),
        ((), {"cells": 2, "choose": 0}, "open", "no selection prompts"),
        ((), {"cells": 1, "choose": 0}, "begun", "no steered row was run yet"),
        # the cell was fixed beforehand, and its own rows failed
        (("controls",), {"cells": 1, "choose": 0}, "waiting", "the chosen setting was not run yet"),
    ],
)
def test_why_nothing_is_declared_is_true_of_the_state(steps, manifest, state, says):
    choose = manifest.pop("choose", 12)
    manifest = {**manifest, "prompts": {"choose": choose, "prove": 12}}
    split = "choose" if choose else "prove"
    plan = [*rows("unsteered", BEFORE, "choose"), *rows("unsteered", BEFORE)]
    run = list(plan)
    grid = [row for k in (1, 2) for row in rows("grid", BEFORE + k, split, level=str(float(k)))]
    for step in steps:
        mine = rows("chosen", BEFORE + MOVED) if step == "chosen" else grid
        mine = nulls([0.0] * 3) if step == "controls" else mine
        plan += mine
        run += mine[:12] if step == "half" else mine
    table = pd.DataFrame(run)
    table["null"] = table["null"].astype("Int64")
    f = Told(table, plan, **manifest).findings()
    assert f.state == state and says in f.verdict.text and f.verdict.steers is None
    told = {why for why in STATES.values() if why and why in str(f)}
    assert told == ({STATES[state]} if STATES[state] else set())


def test_a_grid_of_few_prompts_does_not_say_that_they_chose():
    parts = (
        rows("unsteered", BEFORE[:6]),
        rows("grid", BEFORE[:6] + 1, level="1.0"),
        rows("grid", BEFORE[:6] + 2, level="2.0"),
    )
    f = found(*parts, cells=2, prompts={"choose": 0, "prove": 6})
    assert "no selection prompts" in f.verdict.text
    assert "the grid has 6 prompts" in str(f) and "6 prompts chose" not in str(f)


def test_a_bounded_share_that_hardly_differs_has_no_interval_beside_its_p():
    after = np.zeros(10)
    after[3] = 0.09
    parts = [*rows("unsteered", BEFORE[:10]), *rows("chosen", BEFORE[:10])]
    for row, value in zip(parts, [*np.zeros(10), *after], strict=True):
        row["rep3"] = value
    f = found(parts, metrics=["length", "rep3"])
    (claim,) = f.claims[f.claims["metric"] == "rep3"].to_dict("records")
    assert claim["effect"] == pytest.approx(0.009) and claim["p"] == 1.0
    assert pd.isna(claim["low"]) and claim["method"].startswith("fewer than 3 prompts differ")
    assert "effect +0.009 (no interval)" in str(f)


def test_within_the_limits_is_what_the_choice_saw():
    """The mean over rows that have a value, seeds and prompts together; all missing is beyond."""
    before = rows("unsteered", BEFORE, "choose", seeds=2)
    uneven = rows("grid", BEFORE, "choose", seeds=2, level="1.0")
    for row in uneven:
        row["length"] = np.nan if row["seed"] and row["item"] != "choose0" else row["length"]
    told = [row["length"] for row in uneven if not np.isnan(row["length"])]
    limit = float(np.mean(told)) + 0.1  # prompts averaged first are above it
    assert np.mean(BEFORE) > limit
    lost = rows("grid", BEFORE, "choose", seeds=2, level="2.0", rep3=np.nan)
    f = found(before, uneven, cells=1, limits={"length": limit})
    assert f.state == "beyond" and not f.grid["passes"].any()
    told = {"metrics": ["length", "rep3"], "cells": 1, "limits": {"rep3": 0.2}}
    before = rows("unsteered", BEFORE, "choose", seeds=2, rep3=0.0)
    f = found(before, lost, **told)
    assert f.state == "beyond" and not f.grid["passes"].any()


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
    expected = simultaneous.bands(effects)
    assert f.grid["effect"].to_list() == pytest.approx(effects.mean(0).tolist())
    assert f.grid["low"].to_list() == pytest.approx([e.low for e in expected])
    assert f.grid["best"].to_list() == [False, True, True]
    assert f.best_layers == (1, 2)
    assert f.verdict.steers is None  # nothing was run on prompts that prove


def test_where_less_is_better_the_best_cell_is_the_lowest():
    parts = [rows("unsteered", BEFORE, "choose", surprise=9.0)]
    noise = np.random.default_rng(0).normal(size=(12, 3))
    for k, effect in enumerate((0.0, -5.0, -5.1)):
        mine = rows("grid", BEFORE, "choose", level=str(k + 1.0), layer=k)
        parts.append([{**row, "surprise": 9 + effect + noise[i, k]} for i, row in enumerate(mine)])
    f = found(*parts, cells=3, metrics=["surprise"], choose_by="surprise")
    assert f.grid["best"].to_list() == [False, True, True]


def test_where_less_is_better_less_is_an_effect_and_more_is_none():
    def told(parts):
        return [{**row, "surprise": row["length"]} for row in parts]

    before, less = told(rows("unsteered", BEFORE)), told(rows("chosen", BEFORE - MOVED))
    given = {"metrics": ["surprise", "length"], "choose_by": "surprise"}
    null = told(nulls([9.0] * 39))  # far the other way, or far by |effect|
    f = found(before, less, null, **given)
    assert f.verdict.steers is True and f.verdict.p == pytest.approx(1 / 40)
    by = f.p.set_index("metric")["p"]
    assert by["surprise"] == pytest.approx(1 / 40) and by["length"] == 1.0  # two-sided
    more = told(rows("chosen", BEFORE + MOVED))
    f = found(before, more, told(nulls([99.0] * 39)), **given)
    assert f.verdict.p == pytest.approx(1 / 40) and f.verdict.steers is False
    f = found(before, more, told(nulls([-9.0] * 39)), **given)
    assert f.p.set_index("metric")["p"]["length"] == 1.0  # as far, if the other way


def rated(role, values, seeds=1):
    """Rows of a rate; `values` are of prompts, or of prompts and their seeds."""
    mine = rows(role, BEFORE, seeds=seeds)
    return [{**row, "concept": float(v)} for row, v in zip(mine, np.ravel(values), strict=True)]


def test_a_rate_has_newcombes_interval_and_mcnemars_p():
    before, after = np.arange(12) < 2, np.arange(12) % 6 > 0
    f = found(rated("unsteered", before), rated("chosen", after),
              metrics=["concept"], choose_by="concept")  # fmt: skip
    (claim,) = f.claims.to_dict("records")
    expected = intervals.difference(after, before, kind="rate")
    assert (claim["low"], claim["high"]) == (expected.low, expected.high)
    assert claim["method"] == "paired Newcombe"
    # nine prompts turn to it and one away from it: 2 (1 + 10) / 2^10
    assert ((after & ~before).sum(), (before & ~after).sum()) == (9, 1)
    assert claim["p"] == pytest.approx(22 / 1024)


def test_a_rate_with_seeds_is_of_prompts():
    draw = np.random.default_rng(3)
    after = draw.random((12, 4)) < np.linspace(0, 1, 12)[:, None]
    f = found(rated("unsteered", np.zeros((12, 4)), 4), rated("chosen", after, 4),
              metrics=["concept"], choose_by="concept", seeds=[0, 1, 2, 3])  # fmt: skip
    (claim,) = f.claims.to_dict("records")
    units = np.repeat([f"prove{i}" for i in range(12)], 4).tolist()
    expected = intervals.rate_by_unit(after.ravel(), units)
    assert (claim["mean_low"], claim["mean_high"]) == (expected.low, expected.high)
    assert expected.high - expected.low > 1.2 * np.subtract(*reversed(
        [getattr(intervals.rate(after.ravel()), end) for end in ("low", "high")]
    ))  # fmt: skip


def test_limits_do_not_pass_what_a_metric_can_be():
    after = np.array([1.0] * 9 + [0.2, 0.9, 0.6])
    parts = [*rows("unsteered", BEFORE), *rows("chosen", BEFORE)]
    for row, value in zip(parts, [*np.zeros(12), *after], strict=True):
        row["distinct2"] = value
    f = found(parts, metrics=["distinct2"], choose_by="distinct2")
    (claim,) = f.claims.to_dict("records")
    assert intervals.mean(after).high > 1
    assert claim["high"] == claim["mean_high"] == 1


def test_rows_that_another_study_has_run_have_the_dose_that_they_are_here(tiny, tmp_path):
    vector = torch.randn(64, generator=torch.Generator().manual_seed(2))
    items = [Item(f"I love the {w}", positive=" tower", negative=" rain") for w in WORDS]
    longer = [Item(f"What is {w}, and who? {w}", positive=" a", negative=" b") for w in WORDS]

    def run(prove, folder):
        return Study(
            choose=[], prove=prove,
            directions={"d": Direction.of(vector, "blocks.2.hook_resid_post")}, sites=[2],
            coefficients=[1.0, 2.0, 3.0], metrics="propensity", as_chat=False,
            controls=Controls(random=0, shuffled=0),
        ).run(tiny, folder)  # fmt: skip

    run(items, tmp_path / "both")
    both, fresh = (run([*items[:6], *longer], tmp_path / name) for name in ("both", "fresh"))
    columns = ["level", "item", "dose", "propensity"]
    tables = [one.table()[columns].sort_values(columns[:2]) for one in (both, fresh)]
    pd.testing.assert_frame_equal(*(one.reset_index(drop=True) for one in tables), rtol=1e-4)
    slopes = [one.findings().slopes for one in (both, fresh)]
    assert len(slopes[0]) == 1
    pd.testing.assert_frame_equal(*slopes, rtol=1e-4)


def test_slopes_are_those_of_numpy(tiny, tmp_path):
    vector = torch.randn(64, generator=torch.Generator().manual_seed(2))
    items = [Item(f"I love the {w}", positive=" tower", negative=" rain") for w in WORDS]
    study = Study(
        choose=[], prove=items, directions={"d": Direction.of(vector, "blocks.2.hook_resid_post")},
        sites=[2, 3], coefficients=["-0.05 dose", "0.1 dose", "0.15 dose", "0.2 dose"],
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
    assert "no selection prompts" in f.verdict.text
    assert str(f).startswith("Nothing is declared")
