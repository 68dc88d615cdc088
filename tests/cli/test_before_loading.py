"""Mistakes that are told before the model's weights are read."""

import json

import pytest

from tests.conftest import error
from tests.study.samples import direction

D = ["--direction", "d={folder}/d.safetensors"]
PROMPT = ["--prompt", "I love"]
STUDY = {
    "directions": {"d": "d.safetensors", "made": {"positive": ["I love"], "negative": ["I hate"]}},
    "prompts": {"choose": ["I love the fox"], "prove": ["What is the rain"]},
    "sites": "each 1-2",
    "coefficients": [1],
    "metrics": ["length"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    direction().save(folder / "d.safetensors")
    (folder / "p.txt").write_text("I love the fox\nWhat is the rain")
    (folder / "bad.csv").write_text("prompt,answer\nI love,it\n")
    return folder


@pytest.fixture(autouse=True)
def unread(monkeypatch):
    """Whoever reads weights fails."""
    from interp_steer.model import model

    def read(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(model, "read", read)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["generate", *PROMPT, *D, "--steer", "ad(d, 1) at 1"], "nearest: add"),
        (["generate", *PROMPT, *D, "--steer", "add(e, 1) at 1"], "unknown direction 'e'"),
        (["generate", *PROMPT, *D, "--steer", "add(d, 1) at 99"], "has layers 0-5"),
        (["generate", *PROMPT, *D, "--steer", "add(d, 1) at {1,99}"], "has layers 0-5"),
        (["generate", *PROMPT, *D, "--steer", "add(d, 1) at z 1h99"], "has heads 0-"),
        (["generate", *PROMPT, *D, "--steer", "add(d, 1) at z 1h1"], "is 64 wide"),
        (["generate", *PROMPT, *D, "--steer", "add(d, 2 maxx) at 1"], "nearest: max"),
        (["generate", *PROMPT, "--prompts", "{folder}/bad.csv:question"], "question"),
        (["generate", *PROMPT, "--date", "yesterday"], "expected such as 2024-07-26"),
        (["generate", *PROMPT, "--temperature", "-1"], "temperature is -1"),
        (["chat", *D, "--steer", "add(d, 1) at 99"], "has layers 0-5"),
        (["chat", "--temperature", "-1"], "temperature is -1"),
        (["sweep", *PROMPT, *D, "--steer", "add(d, 1) at {1-9}"], "has layers 0-5"),
        (["sweep", *PROMPT, *D, "--steer", "add(d, 1) at 1", "--out", "{folder}/p.txt"], "a file"),
        (["sweep", *PROMPT, *D, "--steer", "add(d, 1) at 1", "--out", "{folder}/p.txt/r"],
          "cannot be written"),
        (["generate", *PROMPT, "--out", "/proc/answers.json"], "cannot be written"),
        (["ablate", "--prompts", "{folder}/p.txt", "--layers", "99"], "has layers 0-5"),
        (["ablate", "--prompts", "{folder}/p.txt", "--component", "z", "--heads", "99"], "heads"),
        (["direction", "make", "--positive", "{folder}/p.txt", "--negative", "{folder}/p.txt",
          "--layer", "99"], "has layers 0-5"),
        (["export", "gguf", *D, "--steer", "add(d, 1 dose) at 1", "--out", "{folder}/a.gguf"],
          "--include-first"),
        (["export", "gguf", *D, "--steer", "add(d, 1 dose) at 0 on all+first", "--out",
          "{folder}/a.gguf"], "no layer 0"),
        (["export", "steered-gguf", *D, "--steer", "add(d, 1 dose) at 0 on all+first", "--out",
          "{folder}/a.gguf", "--gguf", "{folder}/p.txt"], "is not a GGUF file"),
        (["export", "checkpoint", *D, "--steer", "add(d, 1 dose) at 0 on all+first", "--out",
          "{folder}"], "is there already"),
        (["export", "checkpoint", *D, "--steer", "add(d, 1 dose) at 99 on all+first", "--out",
          "{folder}/c"], "has layers 0-5"),
        (["export", "lm-eval", *D, "--steer", "rotate(d, d, 3 deg) at 1 on all+first", "--out",
          "{folder}/a.pt"], "depends on the activation"),
        (["serve", "--host", "0.0.0.0"], "INTERP_STEER_TOKEN"),
        (["serve", "--as", "happy"], "expected NAME=LINE"),
        (["serve", "--directions", "{folder}/none"], "is no folder"),
        (["serve", "--directions", "{folder}", "--as", "x=add(d, 1) at 99"], "has layers 0-5"),
    ],
)  # fmt: skip
def test_on_the_command_line(folder, tiny_folder, words, expected):
    line = error(2, *(w.replace("{folder}", str(folder)) for w in words), "--model", tiny_folder)
    assert expected in line


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"metrics": ["concpt"]}, "nearest: concept"),
        ({"metrics": ["concept"]}, "needs the study's `concept`"),
        ({"sites": "each 4-9"}, "has layers 0-5"),
        ({"operators": ["ad"]}, "nearest: add"),
        ({"scopes": ["promt"]}, "nearest: prompt"),
        ({"lines": ["add(mad, 1) at 1"]}, "unknown direction 'mad'"),
        ({"method": "mean-diference"}, "nearest: mean-difference"),
        ({"directions": {"d": "gone.safetensors"}}, "no file and no stored direction"),
        ({"coefficients": ["1 doze"]}, "nearest: dose"),
        ({"prompts": {"choose": ["I love"], "prove": ["I love"]}}, "I love"),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_in_a_study(folder, tiny_folder, verb, fields, expected):
    file = folder / "s.yaml"
    file.write_text(json.dumps({**STUDY, "model": str(tiny_folder), **fields}))  # JSON is YAML
    assert expected in error(2, "study", verb, file)


def test_a_folder_that_cannot_be_written(folder, tmp_path):
    file = folder / "s.yaml"
    file.write_text(json.dumps(STUDY))
    (tmp_path / "taken").write_text("")
    for out in (tmp_path / "taken", tmp_path / "taken" / "RUN"):
        assert "--out" in error(2, "study", "run", file, "--out", out)
        assert "--out" in error(2, "demo", "--out", out)
        assert "--out" in error(2, "caa", file, "--out", out)
