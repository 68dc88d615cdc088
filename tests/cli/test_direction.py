"""`direction make`, `list` and `show` as a person reads them."""

import json

import numpy as np
import pytest

from interp_steer.steering.direction import DirectionSet
from tests.conftest import command, error
from tests.study.samples import direction

UP = ["I love the tower.", "Yes, happy and lazy fox", "Name three happy fruits", "I am happy"]
DOWN = ["I hate the rain.", "no, sad and lazy dog", "Name three sad fruits", "maybe sad"]


@pytest.fixture
def sides(tmp_path):
    for name, lines in (("up", UP), ("down", DOWN)):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    return ["--positive", tmp_path / "up.txt", "--negative", tmp_path / "down.txt"]


def test_make_says_what_helps_to_choose_a_layer(tiny, tiny_folder, sides, tmp_path):
    out = tmp_path / "mood.safetensors"
    words = ["direction", "make", "--model", tiny_folder, "--out", out, *sides]
    shown, _ = command(*words)
    lines = [line.split("\t") for line in shown.splitlines()]
    head, rows = lines[0], lines[1:7]
    assert head[:8] == ["layer", "norm", "of |x|", "d", "AUC", "halves", "pairs", "right"]
    d = [float(row[3]) for row in rows]
    assert [row[8] for row in rows] == ["*" if one == max(d) else "" for one in d]
    assert "held-out" in shown and "`interp-steer sweep`" in shown
    # each half of the prompts gives a direction: made by the command itself, compared in NumPy
    halves = []
    for start in (0, 1):
        for name, texts in (("up", UP), ("down", DOWN)):
            (tmp_path / f"{name}.txt").write_text("\n".join(texts[start::2]))
        command(*words[:5], tmp_path / "half.safetensors", *words[6:])
        halves.append(DirectionSet.load(tmp_path / "half.safetensors"))
    for layer, row in enumerate(rows):
        one, other = (half[layer].unit.double().numpy() for half in halves)
        assert float(row[5]) == pytest.approx(np.dot(one, other), abs=0.006)


def test_make_prints_the_same_as_json(tiny_folder, sides, tmp_path):
    words = ["direction", "make", "--model", tiny_folder, "--out", tmp_path / "m.safetensors"]
    found = json.loads(command(*words, *sides, "--layer", "3", "--json")[0])
    assert [row["layer"] for row in found] == [3]
    assert {"norm", "dose", "d", "auc", "halves", "sha"} <= set(found[0])
    (tmp_path / "up.txt").write_text(UP[0])
    lone = json.loads(command(*words, *sides, "--layer", "3", "--json")[0])
    assert lone[0]["d"] is lone[0]["halves"] is None  # one prompt has no other half
    assert "held-out" not in command(*words, *sides, "--layer", "3")[0]


def test_stored_directions_are_listed_and_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path))
    assert "no stored directions" in command("direction", "list")[0]
    folder = tmp_path / "directions"
    direction(layer=3).save(folder / "one.safetensors")
    DirectionSet([direction(layer=2), direction(layer=5)]).save(folder / "many.safetensors")
    (folder / "broken.safetensors").write_bytes(b"none")
    shown, told = command("direction", "list")
    rows = [line.split("\t")[:3] for line in shown.splitlines()]
    assert rows == [["name", "layers", "width"], ["many", "2-5", "64"], ["one", "3", "64"]]
    assert told.count("note: ") == 1 and "broken" in told
    listed = json.loads(command("direction", "list", "--json")[0])
    assert [row["name"] for row in listed] == ["many", "one"]
    by_name, by_file = (
        command("direction", "show", given)[0].splitlines()[1:]
        for given in ("one", f"mine={folder}/one.safetensors")
    )
    assert by_name == by_file and "blocks.3.hook_resid_post" in by_name[-1]
    assert "nearest: one" in error(2, "direction", "show", "onne")
