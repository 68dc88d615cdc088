"""Effect against damage: the Pareto front by brute force, and what the picture holds."""

import itertools

import numpy as np
import pandas as pd
import pytest

from interp_steer.errors import RequestError
from interp_steer.report.damage import against_damage, cost_of, front


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_nothing_dominates(seed):
    draw = np.random.default_rng(seed)
    costs, effects = draw.integers(0, 6, 30).tolist(), draw.integers(0, 6, 30).tolist()

    def dominated(n):
        return any(
            costs[m] <= costs[n] and effects[m] >= effects[n]
            and (costs[m] < costs[n] or effects[m] > effects[n])
            for m in range(30)
        )  # fmt: skip

    best = {(costs[n], effects[n]) for n in range(30) if not dominated(n)}
    found = front(costs, effects)
    assert {(costs[n], effects[n]) for n in found} == best and len(found) == len(best)
    assert all(costs[a] < costs[b] for a, b in itertools.pairwise(found))


def grid(concept, kl):
    rows = []
    for cell, (one, other) in enumerate(zip(concept, kl, strict=True)):
        setting = {"direction": "joy", "operator": "add", "site": f"resid_post {cell}",
                   "level": "0.4 dose", "scope": "all", "cell": cell}  # fmt: skip
        for metric, effect, unit in (("concept", one, ""), ("kl_mean", other, "nats a token")):
            rows.append({**setting, "metric": metric, "effect": effect, "unit": unit,
                         "low": effect - 0.1, "high": effect + 0.1})  # fmt: skip
    return pd.DataFrame(rows)


def test_the_picture_holds_every_setting_and_marks_the_front():
    table = grid([0.1, 0.5, 0.4, 0.9], [0.05, 0.2, 0.3, 0.8])
    chosen = {"direction": "joy", "operator": "add", "site": "resid_post 1", "level": "0.4 dose",
              "scope": "all"}  # fmt: skip
    (axis,) = against_damage(table, "concept", chosen).axes
    lines = {line.get_label(): line for line in axis.lines}
    assert list(lines["_settings"].get_xdata()) == [0.05, 0.2, 0.3, 0.8]
    assert list(lines["_front"].get_ydata()) == [0.1, 0.5, 0.9]
    assert [text.get_text() for text in axis.texts] == ["0, 0.4 dose", "1, 0.4 dose", "3, 0.4 dose"]
    ringed = [line for line in axis.lines if line.get_markersize() == 12]
    assert [list(line.get_xdata()) for line in ringed] == [[0.2]]
    assert "nats a token" in axis.get_xlabel()
    low = against_damage(table, "concept", sign=-1.0).axes[0]
    assert list({ln.get_label(): ln for ln in low.lines}["_front"].get_ydata()) == [0.1]


def test_without_damage_there_is_no_picture():
    table = grid([0.1, 0.5, 0.4], [0.05, 0.2, 0.3])
    alone = table[table["metric"] == "concept"]
    with pytest.raises(RequestError, match="no damage was measured"):
        against_damage(alone, "concept")
    with pytest.raises(RequestError, match="no damage was measured beside kl_mean"):
        cost_of(table[table["metric"] == "kl_mean"], "kl_mean")
    with pytest.raises(RequestError, match="fewer than three"):
        against_damage(table[table["cell"] < 2], "concept")
