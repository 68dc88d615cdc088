"""What the tab key offers: asked as the shells ask, in bash itself, and how long it takes."""

import os
import re
import subprocess
import sys
import time

import pytest

from interp_steer.cli import main as cli
from interp_steer.cli.terminal import completion
from tests.conftest import command
from tests.study.samples import direction


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path))
    for name in ("joy", "jolly", "rain"):
        direction().save(tmp_path / "directions" / f"{name}.safetensors")
    return tmp_path


def offered(*words: str, shell: str = "bash") -> list[str]:
    return command("--complete", shell, *words)[0].splitlines()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["di"], ["direction"]),
        (["--ver"], ["--version"]),
        (["--completion", ""], ["bash", "zsh", "fish"]),
        (["direction", ""], ["make", "select", "word", "list", "import", "show"]),
        (["direction", "sh"], ["show"]),
        (["direction", "show", "jo"], ["jolly", "joy"]),
        (["generate", "--st"], ["--steer"]),
        (["generate", "--max-new-tokens", "5", "--max"], []),  # it is there already
        (["generate", "--steer", "x", "--ste"], ["--steer"]),  # may be repeated
        (["generate", "--model", "s"], ["starter"]),
        (["generate", "--model", "=", "s"], ["starter"]),  # bash parts --model=s so
        (["generate", "--model", "="], ["starter"]),
        (["generate", "--dtype", "fl"], ["float32", "float16"]),
        (["generate", "--prompts", ""], []),  # files: the shell's own
        (["direction", "make", "--chat", "--method", "m"], ["mean-difference"]),
        (["nonsense", ""], []),
        (["direction", "nonsense", ""], []),
        ([], list(cli.COMMANDS)),
    ],
)
def test_what_is_offered(cache, words, expected):
    assert offered(*words) == expected


def test_zsh_and_fish_are_told_what_a_word_is(cache):
    assert offered("direction", "show", "r", shell="fish") == ["rain\tstored direction"]
    assert offered("direction", "show", "r", shell="zsh") == ["rain:stored direction"]
    (line,) = offered("generate", "--model=s", shell="fish")
    assert line.startswith("--model=starter\t")
    (line,) = offered("generate", "--dtyp", shell="zsh")
    assert line.startswith("--dtype:float32, bfloat16")


def test_every_option_is_offered():
    """Against the help that a person reads."""
    shown = command("direction", "make", "--help")[0]
    lines = [line.strip() for line in shown.splitlines()]
    heads = [re.split(r"  +", line)[0] for line in lines if line.startswith(("--", "-h"))]
    options = {word for head in heads for word in re.findall(r"--[\w-]+", head)}
    assert set(offered("direction", "make", "--")) == options and len(options) > 10


def test_choices_are_those_of_the_code():
    from interp_steer.model.device import KINDS
    from interp_steer.steering.contrast import METHODS, POSITIONS

    assert set(completion.CHOICES["--dtype"]) == set(KINDS)
    assert completion.CHOICES["--method"] == (*METHODS, "actadd")
    assert completion.CHOICES["--position"] == POSITIONS


def test_bash_completes(cache):
    """The script as bash reads it, with the function called as the tab key calls it."""
    program = cache / "interp-steer"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m interp_steer "$@"\n')
    program.chmod(0o755)
    typed = 'COMP_WORDS=(interp-steer direction show jo); COMP_CWORD=3; _interp_steer "$1"'
    code = f'eval "$($1 --completion bash)"; {typed}; echo "${{COMPREPLY[*]}}"'
    done = subprocess.run(
        ["bash", "--norc", "-c", code, "bash", str(program)], capture_output=True, text=True
    )
    assert done.stdout == "jolly joy\n", done.stderr


@pytest.mark.parametrize("words", [["generate", "--"], ["features", "rank", "--"], ["study", ""]])
def test_the_tab_key_answers_at_once(words):
    code = (
        "import sys\nfrom interp_steer.cli import main\n"
        f"sys.argv = ['interp-steer', '--complete', 'bash', *{words}]\n"
        "try:\n    main.main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'sae_lens', 'pandas', 'requests', 'rich', 'numpy'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)))"
    )
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}
    )
    # 0.15 s on an idle machine; a heavy import would cost 2 and more
    assert time.monotonic() - begun < 1.5
    assert done.stdout.splitlines()[-1] == "LOADED []" and len(done.stdout.splitlines()) > 2
