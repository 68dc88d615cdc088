import io
import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, Rectangle
from matplotlib.text import Text

from interp_steer.errors import RequestError, RunError
from interp_steer.report import heat, maps, marks, plots, spots

CHOSEN = {
    "direction": "eiffel",
    "operator": "add",
    "site": "resid_post 13",
    "level": "0.6 dose",
    "scope": "prompt",
}


def effect(cell: int, metric: str) -> float:
    """Some number that tells the cells apart."""
    return round((0.1 + 0.01 * len(metric)) * ((7 * cell) % 11) - 0.4, 3)


def grid(
    layers=(12, 13, 14),
    levels=("0.2 dose", "0.6 dose"),
    directions=("eiffel",),
    operators=("add",),
    metrics=("concept",),
    component="resid_post",
    band: float | None = 0.25,
) -> pd.DataFrame:
    """In the schema of `Findings.grid`."""
    cells = list(itertools.product(directions, operators, layers, levels))
    return pd.DataFrame(
        {
            "direction": direction,
            "operator": operator,
            "site": f"{component} {layer}",
            "level": level,
            "scope": "prompt",
            "cell": cell,
            "layer": float(str(layer).split("-")[0].split("h")[0]),
            "coefficient": 10.0 * cell,
            "dose": float(level.split()[0]) if level.endswith("dose") else None,
            "metric": metric,
            "mean": effect(cell, metric) + 0.5,
            "unsteered": 0.5,
            "effect": effect(cell, metric),
            "low": None if band is None else effect(cell, metric) - band,
            "high": None if band is None else effect(cell, metric) + band,
            "n": 24,
            "missing": 0,
            "best": cell % 3 == 1,
            "passes": cell % 4 != 2,
        }
        for metric in metrics
        for cell, (direction, operator, layer, level) in enumerate(cells)
    )


def of(table: pd.DataFrame, **where: object) -> pd.Series:
    """The one row of a table."""
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def panels(figure: Figure) -> list:
    """Axes with a heat map."""
    return [axis for axis in figure.axes if axis.images]


def patches(axis, kind: type, label: str) -> list[tuple[float, float]]:
    """Centres of the patches of a kind, as (column, row)."""
    found = [p for p in axis.patches if isinstance(p, kind) and p.get_label() == label]
    return [
        tuple(np.round(p.center if kind is Ellipse else p.get_center()).tolist()) for p in found
    ]


def ticks(axis, which: str) -> list[str]:
    return [text.get_text() for text in getattr(axis, f"get_{which}ticklabels")()]


def said(figure: Figure) -> str:
    """All that a figure says."""
    return " ".join(" ".join(t.get_text() for t in figure.findobj(Text)).split())


def named(figure: Figure) -> list[str]:
    """The entries of the legend."""
    return [t.get_text() for legend in figure.legends for t in legend.get_texts()]


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of tick labels, titles, axis labels, numbers and small print that touch."""
    figure.draw_without_rendering()
    unseen = [
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick, label in zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=False)
        if not min(axis.get_view_interval()) <= tick <= max(axis.get_view_interval())
    ]
    shown = [
        t
        for t in figure.findobj(Text)
        if t.get_text().strip() and t.get_visible() and t not in unseen
    ]
    boxes = [(t, t.get_window_extent().shrunk(0.96, 0.9)) for t in shown]
    return [
        (a.get_text(), b.get_text())
        for (a, one), (b, other) in itertools.combinations(boxes, 2)
        if one.overlaps(other)
    ]


@pytest.fixture(scope="module")
def heated() -> Figure:
    return heat.heat_map(grid(), chosen=CHOSEN)


# --- heat map -------------------------------------------------------------------------------------


def test_a_heat_map_shows_every_effect_at_its_layer_and_dose():
    table = grid(layers=(9, 10, 11))
    (axis,) = panels(heat.heat_map(table))
    shown = axis.images[0].get_array()
    assert ticks(axis, "x") == ["0.2", "0.6"] and ticks(axis, "y") == ["9", "10", "11"]
    for (y, layer), (x, level) in itertools.product(
        enumerate((9, 10, 11)), enumerate(("0.2 dose", "0.6 dose"))
    ):
        assert shown[y, x] == of(table, layer=layer, level=level)["effect"]
    assert "layer (resid_post)" in axis.get_ylabel()
    assert not axis.yaxis_inverted()  # the first layer is at the bottom


def test_a_heat_map_is_centred_at_no_effect_and_numbered_with_signs(heated):
    (axis,) = panels(heated)
    low, high = axis.images[0].get_clim()
    assert low == -high and high == grid()["effect"].abs().max()
    numbers = {t.get_text() for t in axis.texts}
    assert numbers == {heat._signed(e, 2) for e in grid()["effect"]}
    assert any(n.startswith("−") for n in numbers) and any(n.startswith("+") for n in numbers)
    assert "effect on concept" in said(heated)
    assert "dose (coefficient / median residual norm)" in said(heated)


def test_a_grey_print_of_the_heat_map_still_tells_the_sign(heated):
    colours = panels(heated)[0].images[0].cmap(np.linspace(0, 1, 64))[:, :3]
    grey = colours @ [0.299, 0.587, 0.114]
    assert (np.diff(grey) > 0).all()
    assert np.ptp(colours[32]) < 0.05  # no effect has no hue


def test_the_marks_of_a_heat_map_stand_where_the_table_has_them(heated):
    table = grid()
    (axis,) = panels(heated)
    place = {
        cell: (float(level == "0.6 dose"), float(layer - 12))
        for cell, layer, level in zip(table["cell"], table["layer"], table["level"], strict=True)
    }
    best = [place[c] for c in table[table["best"]]["cell"]]
    beyond = [place[c] for c in table[~table["passes"]]["cell"]]
    assert patches(axis, Rectangle, "not excluded from being best") == best != []
    assert patches(axis, Rectangle, "beyond a limit") == beyond != []
    assert patches(axis, Ellipse, "chosen") == [(1.0, 1.0)]
    assert named(heated) == ["chosen", "not excluded from being best", "beyond a limit"]


def test_marks_that_do_not_occur_are_not_explained():
    table = grid().assign(best=False, passes=True)
    figure = heat.heat_map(table)
    assert not panels(figure)[0].patches and named(figure) == []


def test_directions_and_operators_get_panels_of_their_own_with_one_scale():
    table = grid(directions=("eiffel", "paris"), operators=("add", "clamp"))
    figure = heat.heat_map(table)
    shown = panels(figure)
    assert [a.get_title() for a in shown] == [
        "eiffel, add", "eiffel, clamp", "paris, add", "paris, clamp",
    ]  # fmt: skip
    assert len({a.images[0].get_clim() for a in shown}) == 1
    mine = of(table, direction="paris", operator="clamp", layer=14, level="0.2 dose")["effect"]
    assert shown[3].images[0].get_array()[2, 0] == mine


def test_each_metric_has_its_own_scale():
    figure = heat.heat_map(grid(metrics=("concept", "surprise")))
    one, other = panels(figure)
    assert one.images[0].get_clim() != other.images[0].get_clim()
    assert "effect on surprise (nats a token)" in said(figure)


def test_too_many_panels_leave_the_largest_and_the_chosen_one_and_say_so(heated):
    size = {"eiffel": 0.0, "a": 0.1, "b": 0.3, "c": 0.2}
    table = grid(directions=tuple(size), metrics=("rep3", "concept"))
    table["effect"] = table["direction"].map(size)
    figure = heat.heat_map(table, ["concept"], chosen=CHOSEN, most=2)
    assert [a.get_title() for a in panels(figure)] == ["eiffel", "b"]
    assert "2 of 4 panels" in said(figure) and "panels" not in said(heated)


def test_a_metric_that_some_directions_lack_has_fewer_panels():
    both = pd.concat([grid(metrics=("concept", "rep3")), grid(directions=("paris",))])
    figure = heat.heat_map(both)
    assert [a.get_title() for a in panels(figure)] == ["eiffel", "paris", "eiffel"]


def test_a_missing_effect_is_no_colour_and_no_number():
    table = grid()
    table.loc[table["cell"] == 3, "effect"] = np.nan
    (axis,) = panels(heat.heat_map(table))
    assert axis.images[0].get_array().mask.sum() == 1
    assert [t.get_text() for t in axis.texts].count("none") == 1
    everything = heat.heat_map(grid(layers=(13,)).assign(effect=np.nan))
    assert panels(everything)[0].images[0].get_array().mask.all()


@pytest.mark.parametrize(
    ("levels", "operator", "label", "shown"),
    [
        (("60.0", "120.0"), "latent_clamp", spots.LATENT, ["60", "120"]),
        (("-8.0", "8.5"), "add", "coefficient (residual units)", ["−8", "8.5"]),
        (("1.0 max", "2.0 max"), "add", spots.UNITS["max"], ["1", "2"]),
        (("0.5 dose", "2.0 max"), "add", "coefficient", ["0.5 dose", "2 max"]),
        (("",), "ablate", "", ["ablate"]),
    ],
)
def test_the_axis_of_strengths_has_its_unit(levels, operator, label, shown):
    figure = heat.heat_map(grid(levels=levels, operators=(operator,)))
    assert ticks(panels(figure)[0], "x") == shown
    assert " ".join(label.split()) in said(figure)
    assert ("dose (" in said(figure)) == (label == spots.UNITS["dose"])


def test_whole_lines_of_interventions_are_rows():
    table = grid(layers=(12, 13), levels=("0.2 dose",)).assign(operator="", site="", level="")
    table["scope"] = ""
    table["direction"] = ["add(a, 1.0) at 12", "rotate(a, b, 30.0 deg) at 13"]
    (axis,) = panels(heat.heat_map(table))
    assert ticks(axis, "y") == ["rotate(a, b, 30.0 deg) at 13", "add(a, 1.0) at 12"]  # upwards
    assert axis.images[0].get_array()[1, 0] == table["effect"].iloc[0]


def test_heads_windows_and_components_are_told_apart():
    heads = heat.heat_map(grid(layers=("9h11", "10h2", "9h3"), component="z"))
    assert ticks(panels(heads)[0], "y") == ["9h3", "9h11", "10h2"]
    both = pd.concat([grid(), grid(layers=("12-14",), component="mlp_out")])
    figure = heat.heat_map(both)
    assert [a.get_title() for a in panels(figure)] == ["resid_post", "mlp_out"]


@pytest.mark.parametrize(("layers", "directions"), [((13,), ["eiffel"]), (range(8), "ab")])
def test_nothing_overlaps_in_a_heat_map(layers, directions):
    table = grid(layers=layers, directions=directions, levels=[f"{n / 5} dose" for n in range(5)])
    assert overlapping(heat.heat_map(table, chosen=CHOSEN)) == []


def test_many_layers_have_colours_without_numbers():
    figure = heat.heat_map(grid(layers=range(80)), chosen=CHOSEN)
    (axis,) = panels(figure)
    assert not axis.texts and len(ticks(axis, "y")) == 20
    assert patches(axis, Ellipse, "chosen") == [(1.0, 13.0)] and overlapping(figure) == []


# --- curves ---------------------------------------------------------------------------------------


def drawn(axis) -> dict[str, list[tuple[float, float]]]:
    """The lines of an axis by name."""
    return {
        line.get_label(): list(zip(*map(np.ravel, line.get_data()), strict=True))
        for line in axis.lines
        if not line.get_label().startswith("_")
    }


def test_curves_hold_the_table_and_its_bands():
    table = grid(metrics=("concept", "surprise"), levels=("0.6 dose", "0.2 dose", "0.4 dose"))
    figure = plots.curves(table, chosen=CHOSEN)
    for axis, metric in zip(figure.axes, ("concept", "surprise"), strict=True):
        lines = drawn(axis)
        for layer in (12, 13, 14):
            rows = [
                of(table, metric=metric, layer=layer, level=f"{d} dose") for d in (0.2, 0.4, 0.6)
            ]
            assert lines[f"layer {layer}"] == [(r["dose"], r["effect"]) for r in rows]
        bands = [c for c in axis.collections if len(c.get_paths())]
        assert len(bands) == 3
        first = bands[0].get_paths()[0].vertices
        rows = table[(table["metric"] == metric) & (table["layer"] == 12)]
        assert first[:, 1].min() == rows["low"].min() and first[:, 1].max() == rows["high"].max()
        (ring,) = [ln for ln in axis.lines if ln.get_label() == "_chosen" and len(ln.get_xdata())]
        mine = of(table, metric=metric, layer=13, level="0.6 dose")["effect"]
        assert list(ring.get_xdata()) == [0.6] and list(ring.get_ydata()) == [mine]
        (flat,) = [
            y for name, points in lines.items() if name == "unsteered" for _, y in points[:1]
        ]
        assert flat == 0
    assert figure.axes[1].get_ylabel() == "effect on surprise (nats a token)"
    assert named(figure) == ["layer 12", "layer 13", "layer 14", "unsteered", "chosen"]


def test_without_intervals_there_are_points_and_no_band():
    (axis,) = plots.curves(grid(band=None)).axes
    assert len(axis.collections) == 0 and len(drawn(axis)) == 4


def test_one_layer_gives_a_line_a_direction():
    (axis,) = plots.curves(grid(layers=(13,), directions=("eiffel", "paris"))).axes
    assert set(drawn(axis)) == {"eiffel", "paris", "unsteered"}


def test_of_many_lines_the_chosen_direction_at_even_layers_is_left():
    table = grid(layers=range(30), directions=("paris", "eiffel"))
    figure = plots.curves(table, chosen=CHOSEN)
    names = [n for n in drawn(figure.axes[0]) if n != "unsteered"]
    layers = [int(n.removeprefix("layer ")) for n in names]
    assert len(layers) == 8 and layers[0] == 0 and layers[-1] == 29 and 13 in layers
    assert max(np.diff(layers)) <= 6
    mine = of(table, direction="eiffel", layer=13, level="0.6 dose")["effect"]
    assert drawn(figure.axes[0])["layer 13"][1] == (0.6, mine)
    assert "8 of 30 layers, evenly spaced" in said(figure)
    assert "of 2 combinations only add(eiffel) on prompt" in said(figure)


def test_units_are_not_mixed_on_one_axis():
    shares = grid(layers=(12,), levels=("1.0 max", "2.0 max"), directions=("paris",))
    table = pd.concat([grid(layers=(12,)), shares])
    (axis,) = plots.curves(table).axes
    assert axis.get_xlabel() == "coefficient (residual units)"
    assert [x for x, _ in drawn(axis)["paris"][:2]] == [0.0, 10.0]
    table["dose"] = table["cell"] / 10
    assert plots.curves(table).axes[0].get_xlabel().startswith("dose")


def test_one_strength_has_no_curve():
    with pytest.raises(RequestError, match="no curve"):
        plots.curves(grid(levels=("0.2 dose",)))
    with pytest.raises(RequestError, match="no curve"):
        plots.curves(grid(levels=("",), operators=("ablate",)))


def test_lines_differ_in_lightness_and_mark():
    (axis,) = plots.curves(grid(layers=range(8))).axes
    lines = [line for line in axis.lines if line.get_label().startswith("layer")]
    grey = [np.dot(to_rgb(line.get_color()), [0.299, 0.587, 0.114]) for line in lines]
    assert len(lines) == 8 and min(np.diff(sorted(grey))) > 0.04
    assert all(
        (a.get_marker(), a.get_linestyle()) != (b.get_marker(), b.get_linestyle())
        for a, b in itertools.pairwise(lines)
    )


@pytest.mark.parametrize("layers", [(12, 13), range(20)])
def test_nothing_overlaps_in_curves(layers):
    table = grid(layers=layers, levels=[f"{n / 10} dose" for n in range(1, 9)])
    assert overlapping(plots.curves(table, chosen=CHOSEN)) == []
    assert overlapping(plots.profile(table, chosen=CHOSEN)) == []


# --- layer profile --------------------------------------------------------------------------------


def test_a_profile_of_a_grid_is_drawn_at_the_chosen_strength():
    table = grid(directions=("eiffel", "paris"))
    figure = plots.profile(table, chosen=CHOSEN)
    (axis,) = figure.axes
    assert drawn(axis)["paris"] == [
        (n, of(table, direction="paris", layer=n, level="0.6 dose")["effect"]) for n in (12, 13, 14)
    ]
    (ring,) = [ln for ln in axis.lines if ln.get_label() == "_chosen" and len(ln.get_xdata())]
    assert list(ring.get_xdata()) == [13]
    assert axis.get_xlabel() == "layer" and axis.get_title("left") == "add, 0.6 dose"


def test_a_profile_without_a_chosen_cell_takes_the_strength_with_the_largest_effect():
    table = grid()
    best = table.loc[table["effect"].abs().idxmax()]
    (axis,) = plots.profile(table).axes
    assert axis.get_title("left") == f"add, {best['level']}"
    assert [best["layer"], best["effect"]] in axis.lines[0].get_xydata().tolist()


def summary(components=("attn_out", "mlp_out"), heads=(None,)) -> pd.DataFrame:
    """In the schema of an ablation's summary."""
    table = pd.DataFrame(
        {
            "component": component, "method": "mean", "layer": layer, "last": layer, "head": head,
            "score": score, "estimate": 0.1 * layer + len(component), "low": 0.0, "high": 9.0,
        }
        for score in ("kl_last", "loss")
        for component in components
        for layer in range(5)
        for head in heads
    )  # fmt: skip
    return table.assign(head=table["head"].astype("Int64"))


def test_a_profile_of_an_ablation_has_a_line_a_component_and_a_panel_a_score():
    figure = plots.profile(summary())
    assert [a.get_ylabel().split()[2] for a in figure.axes] == ["kl_last", "loss"]
    for axis in figure.axes:
        assert drawn(axis)["mlp_out"] == [(n, 0.1 * n + 7) for n in range(5)]
        assert set(drawn(axis)) == {"attn_out", "mlp_out", "no change"}
        assert len([c for c in axis.collections if len(c.get_paths())]) == 2


def test_a_profile_keeps_the_largest_lines_and_says_how_many_it_left_out():
    table = summary(("z",), heads=range(12))
    table["estimate"] = table["head"].astype(float)
    figure = plots.profile(table)
    assert set(drawn(figure.axes[0])) == {str(n) for n in range(4, 12)} | {"no change"}
    assert "4 lines with smaller effects left out" in said(figure)


def test_a_profile_of_spans_says_so_and_steered_windows_are_lines_of_their_own():
    table = summary().assign(last=4)
    (axis,) = plots.profile(table, ["loss"]).axes
    assert axis.get_xlabel() == "first layer of the span" and "loss" in axis.get_ylabel()
    both = pd.concat([grid(), grid(layers=("12-14", "13-15"))])
    assert set(drawn(plots.profile(both, chosen=CHOSEN).axes[0])) == {
        "resid_post", "resid_post, 3 layers", "unsteered",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (grid().drop(columns="layer"), "needs a column layer"),
        (grid().drop(columns="effect"), "needs a column estimate"),
        (summary().drop(columns="component"), "several rows for one layer"),
        (summary().iloc[:0], "no rows"),
    ],
)
def test_a_profile_says_what_it_lacks(table, why):
    with pytest.raises(RequestError, match=why):
        plots.profile(table)


# --- controls -------------------------------------------------------------------------------------


def nulls(**effects: list[float]) -> pd.DataFrame:
    rows = [(r, n, "concept", e) for r, es in effects.items() for n, e in enumerate(es)]
    return pd.DataFrame(rows, columns=["role", "null", "metric", "effect"])


CLAIMS = pd.DataFrame(
    [
        ("chosen", "concept", 0.5, 0.3, 0.7),
        ("flip", "concept", -0.1, -0.2, 0.05),
        ("wrong_layer", "concept", 0.04, None, None),
        ("chosen", "rep3", 0.02, 0.01, 0.03),
    ],
    columns=["role", "metric", "effect", "low", "high"],
)


def test_controls_show_every_null_beside_the_chosen_cell():
    draws = np.random.default_rng(3).normal(0, 0.1, 50).round(2).tolist()
    table = nulls(random=draws, shuffled=[0.0, 0.0, 0.1])
    p = pd.DataFrame([("random", "concept", 0.0196)], columns=["control", "metric", "p"])
    figure = plots.controls(table, CLAIMS, "concept", p)
    (axis,) = figure.axes
    lines = {ln.get_label(): ln for ln in axis.lines}
    assert sorted(lines["random"].get_xdata()) == sorted(draws)
    assert list(lines["shuffled"].get_xdata()) == [0.0, 0.0, 0.1]
    assert lines["_chosen"].get_xdata() == [0.5, 0.5]
    assert list(lines["flip"].get_xdata()) == [-0.1]
    assert list(lines["wrong_layer"].get_xdata()) == [0.04]
    spans = [list(ln.get_xdata()) for ln in axis.lines if ln.get_label() == "_interval"]
    assert spans == [[0.3, 0.7], [-0.2, 0.05]]
    (band,) = [p for p in axis.patches if p.get_label() == "_interval"]
    assert band.get_x() == pytest.approx(0.3) and band.get_width() == pytest.approx(0.4)
    assert ticks(axis, "y") == [
        "chosen cell", "its sign turned", "another layer", "random directions\nn 50, p 0.020",
        "shuffled labels\nn 3",
    ]  # fmt: skip
    assert axis.get_xlabel() == "effect on concept" and overlapping(figure) == []


def test_controls_leave_out_what_has_no_effect_and_count_it():
    table = nulls(random=[0.1, np.nan, 0.3], null=[np.nan, np.nan])
    p = pd.DataFrame({"control": ["random", "null"], "metric": "concept", "n": [3, 20],
                      "p": [0.25, 1 / 21]})  # fmt: skip
    claims = CLAIMS.assign(unit="share of answers")
    (axis,) = plots.controls(table, claims, "concept", p).axes
    (line,) = [ln for ln in axis.lines if ln.get_label() == "random"]
    assert list(line.get_xdata()) == [0.1, 0.3]
    assert ticks(axis, "y")[3:] == ["random directions\nn 3, p 0.250"]
    assert axis.get_xlabel() == "effect on concept (share of answers)"


def test_units_are_the_tables_own():
    table = grid(metrics=("shouting",)).assign(unit="shouts")
    assert "effect on shouting (shouts)" in said(heat.heat_map(table))
    assert plots.curves(table).axes[0].get_ylabel() == "effect on shouting (shouts)"
    assert plots.profile(table).axes[0].get_ylabel() == "effect on shouting (shouts)"
    bare = grid(metrics=("surprise",)).assign(unit="")
    assert "nats" not in said(heat.heat_map(bare))


def test_equal_nulls_lie_beside_each_other_and_within_their_strip():
    table = nulls(random=[0.0] * 50, features=[0.0, 0.1])
    (axis,) = plots.controls(table, CLAIMS, "concept").axes
    heights = {}
    for role in ("random", "features"):
        (line,) = [ln for ln in axis.lines if ln.get_label() == role]
        heights[role] = line.get_ydata()
    assert len(set(heights["random"])) == 50
    assert min(heights["random"]) > max(heights["features"])


def test_a_chosen_cell_without_nulls_stands_alone():
    figure = plots.controls(nulls(), CLAIMS, "rep3")
    assert ticks(figure.axes[0], "y") == ["chosen cell"] and "null" not in said(figure)
    assert figure.axes[0].get_xlabel() == "effect on rep3 (share of 3-grams)"


def test_without_a_chosen_cell_there_is_nothing_to_compare():
    for claims in (pd.DataFrame(), CLAIMS[CLAIMS["role"] == "flip"], CLAIMS.assign(effect=np.nan)):
        with pytest.raises(RequestError, match="no chosen cell"):
            plots.controls(nulls(random=[0.1]), claims, "concept")


# --- all ------------------------------------------------------------------------------------------


def test_what_is_not_there_is_named():
    with pytest.raises(RequestError, match="no rep3; it has concept"):
        heat.heat_map(grid(), ["rep3"])
    for draw in (heat.heat_map, plots.curves):
        with pytest.raises(RequestError, match="empty"):
            draw(pd.DataFrame())


def test_hostile_names_are_drawn_as_they_are(tmp_path):
    table = grid((13,), directions=("a$x_1$", "b\x00\u202e"), metrics=("m$^{$",))
    for figure in (heat.heat_map(table), plots.curves(table)):
        path = marks.save(figure, tmp_path / "a.svg")
        assert "\x00" not in said(figure) and "\u202e" not in said(figure)
        assert "a$x_1$" in said(figure) and "m$^{$" in said(figure)
        assert b"\x00" not in path.read_bytes()


def test_a_figure_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, figure = tmp_path / "a.svg", Figure()
    marks.save(figure, path)
    before = path.read_bytes()
    assert before.startswith(b"<?xml")

    def half(part, **options):
        Path(part).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", half)
    with pytest.raises(RunError, match="full"):
        marks.save(figure, path)
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["a.svg"]


def test_figures_are_drawn_in_threads_and_without_pyplot(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    draws = [
        lambda: heat.heat_map(grid((13,)), chosen=CHOSEN),
        lambda: plots.curves(grid((13,)), chosen=CHOSEN),
        lambda: plots.controls(nulls(random=[0.1]), CLAIMS, "concept"),
    ]

    def written(draw) -> bytes:
        file = io.BytesIO()
        draw().savefig(file, format="png", dpi=30)
        return file.getvalue()

    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(written, draws))
    assert together == [written(draw) for draw in draws]


def test_the_dose_response_of_the_demo(tmp_path):
    table = pd.DataFrame(
        [("a", 0.4, 0.1, 1.0), ("a", 0.2, 0.3, 2.0), ("b", 0.4, 0.5, 3.0)],
        columns=["line", "dose", "concept", "surprise"],
    )
    kept: list[Figure] = []
    real = marks.save

    def save(figure: Figure, path: Path) -> Path:
        kept.append(figure)
        return real(figure, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marks, "save", save)
        path = plots.dose_response(
            table,
            {"concept": "answers", "surprise": "nats"},
            {"concept": 0.0, "surprise": 1.5},
            [("b", 0.4)],
            tmp_path / "demo.png",
        )
    assert path.read_bytes().startswith(b"\x89PNG")
    one, other = kept[0].axes
    assert drawn(one)["a"] == [(0.2, 0.3), (0.4, 0.1)]
    assert drawn(other)["unsteered"][0][1] == 1.5
    assert other.get_ylabel() == "nats" and other.get_ylim()[0] <= 0
    (ring,) = [ln for ln in other.lines if ln.get_label() == "_chosen" and len(ln.get_xdata())]
    assert list(ring.get_ydata()) == [3.0]


# --- ticks, colours, paths ------------------------------------------------------------------------


def test_ticks_of_mixed_units_do_not_touch_and_are_in_numeric_order():
    levels = ("0.25 dose", "1.5 max", "12.5", "0.75 dose", "0.5 dose", "10.0 max")
    figure = heat.heat_map(grid(levels=levels, layers=(13,)))
    assert overlapping(figure) == []
    shown = ticks(panels(figure)[0], "x")
    assert shown == ["12.5", "0.25 dose", "0.5 dose", "0.75 dose", "1.5 max", "10 max"]
    table = grid(levels=levels)
    table["coefficient"] = table["level"].map(
        dict(zip(levels, (12.31, 12.92, 12.5, 95.4, 14.1, 13.6), strict=True))
    )
    curves = plots.curves(table)
    assert overlapping(curves) == []
    at = list(curves.axes[0].get_xticks())
    assert at == sorted(at) and {12.31, 95.4} <= set(at) <= set(table["coefficient"])


def test_an_outlier_leaves_the_colours_to_the_others():
    table = grid(layers=range(4, 10))
    table["effect"] = np.where(table["cell"] == 5, 100.0, 0.1 * (table["cell"] - 5))
    figure = heat.heat_map(table)
    (axis,) = panels(figure)
    image = axis.images[0]
    low, high = image.get_clim()
    assert low == -high and high < 3  # 0 stays in the middle
    others = [v for v in image.get_array().compressed() if v != 100]
    reached = image.norm(others)
    assert reached.max() - reached.min() > 0.3
    assert any(t.get_text().startswith("+100") for t in axis.texts) and overlapping(figure) == []


def test_a_map_of_shares_uses_the_whole_scale():
    rows = [
        {"component": "resid", "layer": layer, "position": p, "head": None, "score": "effect",
         "estimate": share}
        for (layer, p), share in zip(
            itertools.product(range(3), range(2)), (0.0, 0.1, 0.4, 0.6, 0.8, -0.02), strict=True
        )
    ]  # fmt: skip
    image = panels(maps.patching(pd.DataFrame(rows)))[0].images[0]
    assert image.get_clim() == (-0.02, 0.8)
    signed = pd.DataFrame(rows).assign(estimate=[-0.8, 0.1, 0.4, 0.6, 0.8, -0.5])
    assert panels(maps.patching(signed))[0].images[0].get_clim() == (-0.8, 0.8)


def test_a_figure_is_saved_under_a_path_that_is_text(tmp_path, heated):
    assert plots.save(heated, str(tmp_path / "x.png")) == tmp_path / "x.png"
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
