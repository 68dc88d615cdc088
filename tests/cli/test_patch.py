"""Patching from one pair of prompts: the function's own numbers, and its pictures."""

import json

import pytest

from interp_steer.causal.patch import patch
from interp_steer.prompts.item import Item
from tests.conftest import command, error

PAIR = {
    "clean": "I love the tower and the", "corrupt": "I hate the tower and the",
    "answer": " fox", "wrong": " dog",
}  # fmt: skip


def words(**more):
    return [part for name, value in {**PAIR, **more}.items() for part in (f"--{name}", value)]


@pytest.mark.parametrize(
    ("by", "component", "positions"), [("position", "resid_pre", "each"), ("head", "z", "all")]
)
def test_the_table_is_that_of_the_function(tiny, tiny_folder, tmp_path, by, component, positions):
    plot = tmp_path / "p.png"
    told = json.loads(
        command("patch", *words(by=by, plot=plot), "--model", tiny_folder, "--json")[0]
    )
    item = Item(PAIR["clean"], PAIR["answer"], PAIR["wrong"], corrupted=PAIR["corrupt"])
    expected = patch(tiny, [item], [component], positions=positions).summary()
    assert [r["estimate"] for r in told] == pytest.approx(expected["estimate"].tolist(), abs=1e-3)
    assert plot.read_bytes().startswith(b"\x89PNG")
    rough = command("patch", *words(by=by), "--attribution", "--model", tiny_folder, "--json")[0]
    assert len(json.loads(rough)) == len(told)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--clean", "I love"], "--corrupt, --answer, --wrong is not given"),
        ([], "give --clean, --corrupt, --answer and --wrong, or --prompts"),
        ([*words(by="hed")], "nearest: head"),
        ([*words(plot="x.gif")], ".png or .svg"),
        ([*words(wrong=" fox")], "same answer on both sides"),
        ([*words(layers="99")], "has layers 0-5"),
        ([*words(corrupt="I hate the tower")], "activations are exchanged between prompts"),
    ],
)
def test_mistakes(tiny_folder, more, expected):
    assert expected in error(2, "patch", *more, "--model", tiny_folder)
