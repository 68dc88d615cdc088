"""Wrong calls: one line, with what was probably meant."""

import pytest

from interp_steer.cli import main as cli
from tests.conftest import command, error
from tests.study.samples import direction


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["directon"], "No such command 'directon'; nearest: direction"),
        (["direction", "mak"], "No such command 'mak'; nearest: make"),
        (["direction", "--jso", "list"], "No such option: --jso"),
        (["labels", "serch", "x"], "No such command 'serch'; nearest: search"),
        (["direction", "make", "--layers", "3"], "No such option: --layers; nearest: --layer"),
        (["ablate", "--componnt", "z"], "No such option: --componnt; nearest: --component"),
        (["features", "find", "--mdel", "x"], "No such option: --mdel; nearest: --model"),
        (["generate", "--layers", "3"], "it stands in --steer 'add(joy, 0.4 dose) at 15 on all'"),
        (["generate", "two", "words"], "put a prompt of several words in quotes"),
        (["generate", "--steer", "add", "joy", "at"], "put the whole text of --steer in quotes"),
        (["chat", "--steer=add", "joy"], "put the whole text of --steer in quotes"),
        (["generate", "--steer", "add(nothing,", "x"], "put the whole text of --steer in quotes"),
        (["generate"], "give a prompt in quotes, or --prompts FILE"),
        (["--completion", "basch"], "nearest: bash"),
    ],
)
def test_a_wrong_call_names_what_was_meant(words, expected):
    assert expected in error(2, *words)


def test_a_mistake_in_steer_with_a_whole_prompt_is_told_alone():
    """The prompt did not come from --steer: its error needs no word on quotes."""
    for prompt in ("a prompt of its own", "hi"):
        said = error(2, "generate", prompt, "--steer", "ad(joy, 1) at 2")
        assert "nearest: add" in said and "quotes" not in said
    assert "quotes" in error(2, "generate", "hi", "--steer", "add")


def test_a_prompt_needs_no_option(tiny_folder, tmp_path):
    file = direction().save(tmp_path / "d.safetensors")
    words = ["--model", tiny_folder, "--max-new-tokens", "4", "--json"]
    words += ["--steer", f"add({file}, 2) at 2"]
    plain = command("generate", "Name three fruits.", *words)
    assert plain == command("generate", "--prompt", "Name three fruits.", *words)
    both = command("generate", "I love", "--prompt", "the rain", *words)
    assert both == command("generate", "--prompt", "I love", "--prompt", "the rain", *words)


@pytest.mark.parametrize("path", [[], *([name] for name in cli.COMMANDS), ["direction", "show"]])
def test_h_is_help(path):
    assert command(*path, "-h") == command(*path, "--help")
