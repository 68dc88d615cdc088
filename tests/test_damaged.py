"""Damaged run folders: the run, its findings and its report end in one line, whatever is wrong."""

import json
import shutil

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from interp_steer.errors import RequestError, RunError, SteerError
from interp_steer.report import report
from interp_steer.report.run import Run
from tests.report.test_report import make_run

DEEP = "[" * 100_000
LONG = "9" * 6_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    make_run(folder, nulls=(("random", 2),))
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(report._Report, "_pictures", lambda *_: [])


def refused(folder, kind=RunError) -> str:
    with pytest.raises(kind) as caught:
        report.write(Run(folder))
    said = str(caught.value)
    assert "\n" not in said and len(said) < 400
    assert not (folder / "report.html").exists()
    return said


def changed(path, change):
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))


@pytest.mark.parametrize("name", ["manifest.json", "plan.jsonl"])
@pytest.mark.parametrize(
    "content", ["[]", "[1]", "7", '"text"', "null", "{}", "", "{", DEEP, LONG, "\udcff", "NaN"]
)
def test_a_file_that_holds_something_else(folder, name, content):
    (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    if (name, content) == ("plan.jsonl", ""):  # nothing was planned: a run that has just begun
        refused(folder, RequestError)
        return
    assert name in refused(folder)


@pytest.mark.parametrize(
    "key",
    [
        "about", "question", "metrics", "choose_by", "limits", "controls", "selected", "cells",
        "concept", "sampling", "seeds", "chunk", "prompts", "directions", "model", "revision",
        "dtype", "device", "n_layers", "threads", "versions", "machine", "arguments", "modules",
        "written_at",
    ],
)  # fmt: skip
def test_a_manifest_with_an_entry_lost_or_of_another_type(folder, key):
    path = folder / "manifest.json"
    before = path.read_text()
    changed(path, lambda told: told.pop(key))
    assert f"{key} is missing" in refused(folder)
    for wrong in (["a", {}], {"a": [None]}, -0.5, 10**30):
        path.write_text(before)
        changed(path, lambda told, wrong=wrong: told.update({key: wrong}))
        if (key, wrong) == ("machine", {"a": [None]}):  # shown as it is
            continue
        assert key in refused(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told.update(choose_by="gone"), "not among the metrics"),
        (lambda told: told.update(limits={"gone": 1.0}), "not among the metrics"),
        (lambda told: told.update(limits={"concept": "0.2"}), "limits.concept is '0.2'"),
        (lambda told: told["prompts"].update(choose="12"), "prompts.choose is '12'"),
        (lambda told: told["prompts"].pop("prove"), "prompts.prove is missing"),
        (lambda told: told["sampling"].update(top_k=None), "sampling.top_k is 'None'"),
        (lambda told: told.update(question="\ud800"), "half a character"),
        (lambda told: told.update(selected=-1), "selected is -1"),
        (lambda told: told.update(selected=2**62), "selected is 46"),
        (lambda told: told.update(cells=0), "cells is 0"),
        (lambda told: told.update(threads=100_000), "threads is 100000"),
        (lambda told: told.update(earlier=5), "earlier is of type int"),
        (lambda told: told.update(earlier=[1]), "earlier[0] is of type int"),
        (lambda told: told["prompts"].update(prove=-1), "prompts.prove is -1"),
        (lambda told: told.update(metrics=[]), "not among the metrics"),
        (lambda told: told.update(metrics=["concept", 7]), r"metrics[1] is of type int"),
        (lambda told: told.update(measures=[1]), "measures is of type list"),
        (lambda told: told.update(measures={"concept": {}}), "declaration of 'concept'"),
    ],
)
def test_a_manifest_that_contradicts_itself(folder, change, said):
    changed(folder / "manifest.json", change)
    assert said in refused(folder)


@pytest.mark.parametrize(
    "key", ["role", "null", "split", "item", "seed", "direction", "operator", "site", "level",
            "scope", "key"],
)  # fmt: skip
def test_a_plan_with_an_entry_lost_or_of_another_type(folder, key):
    path = folder / "plan.jsonl"
    lines = path.read_text().split("\n")
    for wrong in (None, ["a"], {}, True):
        told = json.loads(lines[2])
        told[key] = wrong
        if wrong is None:
            del told[key]
        path.write_text("\n".join([*lines[:2], json.dumps(told), *lines[3:]]))
        assert f"line 3, is damaged: {key} is" in refused(folder)


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("metrics", None), ("metrics", "text"), ("metrics", ["concept"]),
        ("metrics", {"concept": "1.0"}), ("metrics", {"concept": [1.0]}),
        ("metrics", {"surprise": True}), ("layer", "12"), ("layer", 10**30), ("dose", "0.4"),
        ("coefficient", {}), ("prompt", 7), ("prompt", "\ud800"), ("text", ["a"]), ("finish", 1),
        ("head", 0.5),
    ],
)  # fmt: skip
def test_a_row_with_an_entry_lost_or_of_another_type(folder, key, wrong):
    path = folder / "rows.jsonl"
    lines = path.read_text().split("\n")
    told = json.loads(lines[30])
    told[key] = wrong
    path.write_text("\n".join([*lines[:30], json.dumps(told), *lines[31:]]))
    assert "damaged" in refused(folder)
    told.pop(key)
    path.write_text("\n".join([*lines[:30], json.dumps(told), *lines[31:]]))
    lost = "is damaged at byte" if key == "metrics" else f"{key} is missing"
    assert lost in refused(folder)


@pytest.mark.parametrize("content", [DEEP, "[]", "7", "\udcff", ""])
def test_rows_that_are_something_else(folder, content):
    (folder / "rows.jsonl").write_bytes(content.encode(errors="surrogateescape") + b"\n")
    refused(folder, SteerError)


@pytest.mark.usefixtures("undrawn")
def test_values_that_no_row_has_are_missing(folder):
    changed(folder / "manifest.json", lambda told: told["metrics"].append("length"))
    text = report.write(Run(folder)).read_text()
    assert "length" in text and "Tokens of the answer" in text


BOMB = "\n".join(["a: &a [x, x]", *(f"{b}: &{b} [*{a}, *{a}]" for a, b in zip(
    "abcdefghijklmnopqrstuvw", "bcdefghijklmnopqrstuvwx", strict=True)), "sites: *x"])  # fmt: skip


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("content", [BOMB, "[", DEEP, f"sites: {LONG}", "\udcff", "- a", ""])
def test_a_damaged_study_file_is_left_out(folder, content):
    (folder / "study.yaml").write_bytes(content.encode(errors="surrogateescape"))
    text = report.write(Run(folder)).read_text()
    assert "<dt>settings</dt>" in text and "<dt>sites</dt>" not in text


@pytest.mark.parametrize("level", ["abc", "nan dose", "1e400"])
def test_a_strength_that_is_none_is_drawn_without(folder, level, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    path = folder / "plan.jsonl"
    path.write_text(path.read_text().replace("0.4 dose", level))
    assert report.write(Run(folder)).is_file()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("members", [DEEP, '[{"source": []}]', "[1]", "[]", "7"])
def test_a_damaged_direction_beside_the_run_is_left_out(folder, members):
    (folder / "directions").mkdir()
    path = folder / "directions" / "eiffel.safetensors"
    save_file({"v": torch.ones(2)}, path, {"members": members})
    assert "eiffel@9e4eb64f" in report.write(Run(folder)).read_text()
