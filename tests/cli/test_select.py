"""Choosing a direction from two files."""

import json

import pytest

from interp_steer.steering.direction import load
from tests.conftest import command, error

WORDS = ["fox", "dog", "tower", "rain", "mountain", "fruit", "sad", "happy", "quick", "lazy"]


@pytest.fixture
def files(tmp_path):
    for name, verb in (("yes", "love"), ("no", "hate")):
        (tmp_path / name).write_text("\n".join(f"I {verb} the {w}" for w in WORDS))
    return ("--positive", tmp_path / "yes", "--negative", tmp_path / "no")


def test_a_chosen_direction_is_stored_and_can_be_used(files, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path / "cache"))
    told = json.loads(
        command("direction", "select", *files, "--name", "r", "--word", "happy", "--max-kl", "9",
                "--layers", "1-3", "--model", tiny_folder, "--json")[0]
    )  # fmt: skip
    (chosen,) = [row for row in told["candidates"] if row["chosen"]]
    assert told["candidates"][0] == chosen and chosen["veto"] == ""
    eligible = [row for row in told["candidates"] if not row["veto"]]
    assert chosen["ablated"] == min(row["ablated"] for row in eligible)
    assert (chosen["layer"], chosen["position"]) == (told["layer"], told["position"])
    stored = load(told["file"])
    assert stored.site.layer == chosen["layer"]
    assert {row["measure"] for row in told["held_out"]} == {"added", "ablated", "kl"}
    out, _ = command("generate", "--prompt", "I love", "--model", tiny_folder, "--steer",
                     told["steer"], "--max-new-tokens", "3")  # fmt: skip
    assert "[ablate(r@" in out


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--by", "addd"], "nearest: add"),
        (["--layers", "99"], "has layers 0-5"),
        (["--name", "3"], "cannot name a direction"),
    ],
)
def test_mistakes(files, tiny_folder, more, expected):
    assert expected in error(2, "direction", "select", *files, "--model", tiny_folder, *more)


def test_too_few_prompts(tiny_folder, tmp_path):
    (tmp_path / "few.txt").write_text("I love\nI hate\n")
    files = ("--positive", tmp_path / "few.txt", "--negative", tmp_path / "few.txt")
    assert "three parts need at least 8" in error(2, "direction", "select", *files)
