"""`interp-steer ablate`: checked before a model loads, and nothing that was found is lost."""

import json
import os
import sys

import pandas as pd
import pytest

from interp_steer.causal.ablate import ablate
from interp_steer.causal.patch import Patching
from interp_steer.cli import main as cli
from interp_steer.cli.causal.ablate import layer_table
from interp_steer.errors import RequestError
from interp_steer.prompts.item import Item
from interp_steer.report import maps, marks
from interp_steer.report.chosen import setting_of
from interp_steer.report.run import Run
from interp_steer.study.cell import Controls
from tests.conftest import command, error
from tests.study.samples import WORDS, direction, study

PAIRS = [
    {
        "prompt": f"I love the {w}; I hate",
        "corrupted": f"I hate the {w}; I love",
        "positive": " rain",
        "negative": " fox",
    }
    for w in ("tower", "rain", "dog")
]


LOUD = """
from interp_steer import metric

@metric(kind="mean")
def loud(measured):
    return [1.0 for _ in measured.results]
"""
NONE = Controls(random=0, features=0, shuffled=0, flip=False, wrong_layer=False)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    (folder / "plain.txt").write_text("I love the fox\nI hate the dog\n")
    direction().save(folder / "d.safetensors")
    given = {"concept": ["tower", "rain"], "metrics": ["length", "mention", "kl_mean"]}
    given |= {"choose_by": "kl_mean", "sites": "2", "coefficients": ["0.5 dose"], "controls": NONE}
    study(**given).run(tiny, folder / "run")
    return folder


PROMPTS = ["--prompts", "{f}/pairs.jsonl"]
TRACED = ["{f}/run", "--mediate"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([*PROMPTS, "--patch", "--mediate"], "three things; give one"),
        ([*PROMPTS, "--patch", "--method", "mean"], "--method does nothing with --patch; it takes"),
        ([*PROMPTS, "--patch", "--span", "window"], "--span does nothing with --patch"),
        ([*PROMPTS, "--patch", "--score", "loss"], "--score does nothing with --patch"),
        ([*PROMPTS, "--patch", "--first"], "--first does nothing with --patch"),
        ([*PROMPTS, "--positions", "each"], "--positions does nothing with ablation"),
        ([*TRACED, *PROMPTS], "--prompts does nothing with --mediate"),
        ([*TRACED, "--layers", "3"], "--layers does nothing with --mediate"),
        (["{f}/run", "--propagate", "--component", "z"], "--component does nothing with --prop"),
        ([*PROMPTS, "--patch", "--component", "direction"], "unknown component 'direction'"),
        ([*TRACED, "--component", "resid_pre"], "unknown component 'resid_pre'"),
        ([*TRACED, "--score", "kl"], "unknown score 'kl'; nearest: kl_all"),
        ([*TRACED, "--score", "loss", "--score", "words"], "takes one --score"),
        ([*PROMPTS, "--method", "means"], "unknown method 'means'; nearest: mean"),
        ([*PROMPTS, "--span", "up"], "unknown span 'up'; nearest: upward"),
        ([*PROMPTS, "--width", "2"], "--width is for --span window"),
        ([*PROMPTS, "--width", "0"], "--width is 0, expected at least 1"),
        ([*PROMPTS, "--batch", "0"], "--batch is 0, expected at least 1"),
        ([*PROMPTS, "--heads", "1"], "--heads is for component z"),
        ([*PROMPTS, "--patch", "--heads", "1"], "--heads is for component z"),
        ([*PROMPTS, "--component", "z", "--span", "upward"], "one layer at a time"),
        ([*PROMPTS, "--component", "direction"], "needs a vector: what is ablated there; give --d"),
        ([*PROMPTS, "--direction", "{f}/d.safetensors"], "--direction is for component direction"),
        (
            [*PROMPTS, "--component", "feature", "--direction", "{f}/d.safetensors"],
            "needs a feature of an SAE",
        ),
        ([*PROMPTS, "--component", "direction", "--direction", "gone"], "no direction 'gone'"),
        ([*PROMPTS, "--score", "words"], "--score words needs --word"),
        ([*PROMPTS, "--score", "loss", "--word", "fox"], "--word is for --score words"),
        ([*PROMPTS, "--answer", "8"], "--answer is for --score words"),
        ([*PROMPTS, "--word", " "], "a --word is empty"),
        (["--prompts", "{f}/plain.txt", "--score", "logit_difference"], "plain.txt has none"),
        (["--prompts", "{f}/plain.txt", "--patch"], "lacks answers, positive and negative"),
        (["--prompts", "{f}/gone.txt"], "gone.txt"),
        ([*PROMPTS, "--layers", "2-"], "--layers is '2-', expected such as"),
        ([*PROMPTS, "--patch", "--positions", "1,x"], "--positions is '1,x', expected such as"),
        ([*PROMPTS, "--patch", "--positions", "lst"], "unknown positions 'lst'; nearest: last"),
        ([*PROMPTS, "--patch", "--positions", "all"], "resid_pre at all positions is the whole"),
        ([*PROMPTS, "--plot", "{f}/a.gif"], "a.gif: expected a .png or .svg file"),
        ([*PROMPTS, "--plot", "{f}/pairs.jsonl/a.png"], "a.png cannot be written"),
    ],
)
def test_every_combination_is_checked_before_a_model_is_loaded(folder, words, expected):
    """Were the model looked for, its name would be what is wrong."""
    words = ["ablate", *(word.format(f=folder) for word in words), "--model", "/no/model"]
    assert expected in error(2, *words)


def patched(folder, *words) -> list[dict]:
    given = ("ablate", "--model", Run(folder / "run").manifest["model"], "--text", "--patch")
    return json.loads(command(*given, "--prompts", folder / "pairs.jsonl", *words, "--json")[0])


@pytest.mark.parametrize(
    ("positions", "places"),
    [
        ((), list(range(8))),
        (("--positions", "last"), [-1]),
        (("--positions", "-1,0,2-3"), [-1, 0, 2, 3]),
        (("--positions", "all", "--component", "attn_out"), [None]),
    ],
)
def test_positions_on_the_command_line(folder, positions, places):
    found = patched(folder, *positions, "--layers", "1,4")
    assert [row["position"] for row in found if row["layer"] == 4] == places
    assert {row["score"] for row in found} == {"logit_difference"}


def test_each_mode_draws_its_picture(folder, tmp_path, monkeypatch):
    """Position x layer of patching, layer profiles of the rest; the score on an axis."""
    figures = []
    save = marks.save
    monkeypatch.setattr(marks, "save", lambda one, path: figures.append(one) or save(one, path))
    patched(folder, "--plot", tmp_path / "each.png")
    one = ("--component", "mlp_out", "--positions", "all")
    patched(folder, *one, "--plot", tmp_path / "all.png")
    run = folder / "run"
    for mode in ("--mediate", "--propagate"):
        out, _ = command("ablate", run, mode, "--plot", tmp_path / f"{mode}.png")
        assert "add(d, 0.5 dose) at resid_post 2" in out and f"wrote {tmp_path}" in out
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in tmp_path.iterdir())
    each, everywhere, mediated, moved = figures
    (image,) = each.axes[0].images
    assert image.get_array().shape == (6, 8)
    assert each.axes[0].get_xlabel() == "position" and each.axes[0].get_ylabel() == "layer"
    assert each.axes[1].get_ylabel() == "share of the logit difference\nbrought back"
    assert everywhere.axes[0].get_ylabel() == "share of the logit difference\nbrought back"
    assert mediated.axes[0].get_ylabel() == "share of the effect on words that\ngoes"
    assert "last position" in moved.axes[0].get_ylabel().replace("\n", " ")
    assert len(moved.axes[0].lines[0].get_xdata()) == 4  # layers 2 to 5


def test_the_map_is_the_table(folder):
    rows = [(layer, n, layer * 10 + n) for layer in (0, 3) for n in (-1, 0, 1)]
    summary = pd.DataFrame(rows, columns=["layer", "position", "estimate"]).assign(
        component="mlp_out", head=None, score="logit_difference"
    )
    table = pd.DataFrame({"position": [0, 0, 1, -1], "token": [" a", " a", " b", " c"]})
    table = pd.concat([table, table.assign(token=[" a", " a", " z", " c"])])
    figure = maps.patching(summary, table)
    (image,) = figure.axes[0].images
    assert image.get_array().tolist() == [[0, 1, -1], [30, 31, 29]]  # positions from the end last
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["a  0", "b …  1", "c  −1"]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["0", "3"]
    heads = summary.assign(head=summary["position"] + 1, position=None)
    (image,) = maps.patching(heads).axes[0].images
    assert image.get_array().tolist() == [[-1, 0, 1], [29, 30, 31]]
    both = pd.concat([heads, heads.assign(head=None, component="attn_out")])
    assert maps.patching(both).get_supxlabel() == "attn_out: no heads, not drawn"
    with pytest.raises(RequestError, match="no place has a share"):
        maps.patching(summary.assign(estimate=float("nan")))


def test_a_picture_that_cannot_be_drawn_costs_nothing_else(folder, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("ink")

    monkeypatch.setattr(maps, "mediation", broken)
    files = ("--plot", tmp_path / "a.png", "--out", tmp_path / "a.csv")
    out, err = command("ablate", folder / "run", "--mediate", *files, code=1)
    assert "mlp_out" in out and "words: unsteered" in out
    assert "the table is complete" in err and "a.png could not be made: ink" in err
    assert len(pd.read_csv(tmp_path / "a.csv")) == 4 * 2 * 3 and not (tmp_path / "a.png").exists()


def test_a_reader_that_leaves_early_costs_no_file(folder, tmp_path, monkeypatch):
    out, (reader, writer) = tmp_path / "a.csv", os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, pytest.raises(SystemExit) as ended:
        monkeypatch.setattr(sys, "stdout", closed)
        words = ["interp-steer", "ablate", folder / "run", "--propagate", "--out", out]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        cli.main()
    assert ended.value.code == 0 and len(pd.read_csv(out)) == 4 * 4


def test_shares_come_with_their_score_and_their_doubts(folder):
    out, err = command("ablate", folder / "run", "--mediate", "--json")
    assert {row["score"] for row in json.loads(out)} == {"words"}
    assert "warning: the effect on words is" in err and "with 4 prompts nothing tells it" in err
    out, err = command("ablate", folder / "run", "--mediate", "--score", "kl_last")
    assert "kl_last: unsteered 0.000 -> steered" in out and "share of it that goes" in out
    assert "no intervals: fewer than 10 prompts" in err
    words = ("ablate", folder / "run", "--mediate", "--json", "--answer")
    one, many = (json.loads(command(*words, n)[0]) for n in (1, 8))
    assert one[0]["effect"] != many[0]["effect"]


# --- the run whose steering is traced -------------------------------------------------------------

MAIN = "dtype: float32\nrevision: main\n"


def test_a_run_is_traced_on_its_own_model(folder, tiny_folder, monkeypatch):
    from interp_steer.model import model

    loads = []
    load = model.SteeringModel.load
    monkeypatch.setattr(
        model.SteeringModel, "load",
        # a folder has no revisions: what is asked for is looked at, and left out
        lambda name, **options: loads.append((name, options)) or load(
            name, **{**options, "revision": None}
        ),
    )  # fmt: skip
    run = folder / "run"
    yaml = (run / "study.yaml").read_text()
    (run / "study.yaml").write_text(yaml.replace("dtype: float32\n", MAIN))
    try:
        command("ablate", run, "--propagate")
        ((name, options),) = loads
        assert name == str(tiny_folder)
        assert (options["dtype"], options["revision"]) == ("float32", "main")
        command("ablate", run, "--propagate", "--model", tiny_folder, "--dtype", "bfloat16")
        name, options = loads[1]
        assert (options["dtype"], options["revision"]) == ("bfloat16", None)
    finally:
        (run / "study.yaml").write_text(yaml)


def test_other_weights_under_the_same_name_are_refused(folder):
    path = folder / "run" / "manifest.json"
    kept = path.read_text()
    manifest = json.loads(kept)
    manifest["about"]["model"] = "0123456789abcdef"
    path.write_text(json.dumps(manifest))
    for rows in (folder / "run").glob("rows*.jsonl"):
        text = rows.read_text()
        rows.write_text(text.replace(json.loads(kept)["about"]["model"], "0123456789abcdef", 1))
    try:
        line = error(2, "ablate", folder / "run", "--propagate")
        assert "its fingerprint is" in line and "the run's 0123456789abcdef" in line
        command("ablate", folder / "run", "--propagate", "--model", manifest["model"])
    finally:
        path.write_text(kept)
        for rows in (folder / "run").glob("rows*.jsonl"):
            text = rows.read_text()
            rows.write_text(text.replace("0123456789abcdef", json.loads(kept)["about"]["model"], 1))


def test_a_study_without_pairs_and_concept_is_traced_by_kl(tiny, tmp_path):
    given = {"metrics": ["length"], "choose_by": "length", "choose": [], "sites": "2"}
    study(**given, coefficients=["0.5 dose"], controls=NONE).run(tiny, tmp_path)
    found = json.loads(command("ablate", tmp_path, "--mediate", "--json")[0])
    assert {row["score"] for row in found} == {"kl_last"} and len(found) == 2 * 3
    assert "none" not in error(2, "ablate", tmp_path, "--mediate", "--score", "words")


def test_a_run_is_traced_without_its_own_metrics(tiny, tmp_path):
    """As a run that somebody sent: its files are not run, and need not be there."""
    module = tmp_path / "loud.py"
    module.write_text(LOUD)
    given = {"metrics": ["loud", "length"], "choose_by": "loud", "limits": {"loud": 0.5}}
    given |= {"sites": "2", "coefficients": ["0.5 dose"], "controls": NONE}
    study(**given, modules=[module]).run(tiny, tmp_path / "run")
    module.write_text("raise SystemExit('run')")
    command("ablate", tmp_path / "run", "--propagate")
    module.unlink()
    found = json.loads(command("ablate", tmp_path / "run", "--mediate", "--json")[0])
    assert len(found) == 2 * 3


@pytest.mark.parametrize(
    ("changes", "lines", "expected"),
    [
        ({}, 0, "no steered row was run yet; `interp-steer study run`"),
        ({}, 7, "no steered row was run yet; `interp-steer study run`"),
        ({}, 9, "no steered row was run yet; `interp-steer study run`"),
        ({"choose": []}, None, "there are no selection prompts, so no setting is claimed"),
        ({"limits": {"length": 99.0}}, None, "no setting stayed within the limits (length 99)"),
        ({}, 10, "the chosen setting was not run yet; `interp-steer study run`"),
        ({}, None, None),
    ],
)
def test_why_a_run_has_no_chosen_cell(tiny, tmp_path, changes, lines, expected):
    """A run as it is stopped after so many rows: 6 unsteered, a grid of 2, the rest proves."""
    given = {"metrics": ["length"], "choose_by": "length", "coefficients": ["0.5 dose"]}
    given |= {"sites": "each 1-2" if changes.get("choose") == [] else "2", "limits": {}}
    given |= {"choose": [f"I love the {w}" for w in WORDS[:2]], "controls": NONE}
    made = study(**{**given, **changes})
    run = made.run(tiny, tmp_path)
    if lines is not None:  # as the plan and the rows of a run that was killed
        plan = (tmp_path / "plan.jsonl").read_text().splitlines()
        stages = 0 if lines == 0 else 6 if lines == 7 else 8
        (tmp_path / "plan.jsonl").write_text("\n".join(plan[:stages]))
        rows = (tmp_path / "rows.jsonl").read_text().splitlines()
        (tmp_path / "rows.jsonl").write_text("\n".join(rows[: {9: 7}.get(lines, 99)]) + "\n")
        run = Run(tmp_path)
    if expected is None:
        assert setting_of(run)[:3] == ("d", "add", "resid_post 2")
        return
    with pytest.raises(RequestError) as caught:
        setting_of(run)
    assert expected in str(caught.value)


def test_patching_tables_of_unequal_prompts_count_their_own_items():
    rows = [
        ("mlp_out", 0, n, "t", item, "logit_difference", 1.0, 0.0, value)
        for item, length, value in (("a", 2, 0.5), ("b", 3, 1.0))
        for n in range(length)
    ]
    columns = ["component", "layer", "position", "token", "item", "score"]
    table = pd.DataFrame(rows, columns=[*columns, "clean", "corrupt", "value"]).assign(head=None)
    summary = Patching(table).summary()
    assert list(summary["estimate"]) == [0.75, 0.75, 1.0] and list(summary["n"]) == [2, 2, 1]


def test_a_terminal_gets_a_row_a_layer_and_a_column_a_component(tiny):
    items = [Item("I love the tower", " fox", " dog"), Item("I hate the rain", " fox", " dog")]
    found = ablate(tiny, items, ["mlp_out", "attn_out"], ["zero", "mean"], layers=[1, 3])
    summary = found.summary()
    heads, rows = layer_table(summary[summary["score"] == "logit_difference"])
    assert heads == ["layer", *(f"{c} {m}" for c in ("mlp_out", "attn_out")
                                for m in ("zero", "mean"))]  # fmt: skip
    assert [row[0] for row in rows] == ["1", "3"]
    changes = found.table[found.table["score"] == "logit_difference"]
    for row in rows:
        for head, cell in zip(heads[1:], row[1:], strict=True):
            component, method = head.split()
            mine = changes[
                (changes["component"] == component)
                & (changes["method"] == method)
                & (changes["layer"] == int(row[0]))
            ]
            assert cell == f"{mine['change'].mean():+.3f}"
