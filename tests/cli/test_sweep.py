"""A sweep on the command line: one batch, by layer and strength, that goes on where it ended."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from matplotlib.figure import Figure

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row, Sampling
from interp_steer.prompts.prompt import chat
from interp_steer.report.run import Run
from interp_steer.steering.grammar import parse
from interp_steer.steering.intervention import resolve
from interp_steer.steering.scale import Scale
from tests.conftest import command, error
from tests.study.samples import contents, direction

STEER = "add(d, {0.3,0.6} dose) at {1-3}"
PROMPTS = ["I love the fox", "What is the rain"]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Pictures are drawn but not rendered, which takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    direction().save(folder / "d.safetensors")
    (folder / "p.txt").write_text("\n".join(PROMPTS))
    (folder / "q.txt").write_text("I love the dog\nWhat is the tower\nName the fruits")
    return folder


def words(folder, tiny_folder, out="run", **more):
    return (
        "sweep", "--steer", STEER, "--prompts", folder / "p.txt", "--model", tiny_folder,
        "--direction", f"d={folder}/d.safetensors", "--max-new-tokens", 6, "--out", folder / out,
        *(part for name, value in more.items() for part in (f"--{name}", value)),
    )  # fmt: skip


def test_a_sweep_is_every_setting_on_every_prompt(folder, tiny, tiny_folder):
    out, _ = command(*words(folder, tiny_folder))
    assert "claims none" in out and "--prove HELD_OUT.txt" in out
    heads, *rows = [line.split("\t") for line in out.splitlines() if "\t" in line]
    assert heads == ["direction", "operator", "site", "level", "scope", "kl_mean", "rep3",
                     "surprise"]  # fmt: skip
    assert [row[2:4] for row in rows] == [
        [f"resid_post {layer}", f"{dose} dose"] for dose in (0.3, 0.6) for layer in (1, 2, 3)
    ]
    # the texts are those of the engine, asked without a study
    run = Run(folder / "run")
    table = run.table()
    asked = [chat(text) for text in PROMPTS]
    scale = Scale.of(tiny, [tiny.encode(prompt) for prompt in asked])
    engine, sampling = Engine(tiny), Sampling(max_new_tokens=6)
    for text, prompt in zip(PROMPTS, asked, strict=True):
        for layer, dose in ((1, 0.3), (3, 0.6)):
            steer = resolve(parse(f"add(d, {dose} dose) at {layer}", {"d": direction()}), scale)
            (result,) = engine.generate([Row(prompt, steer, sampling)])
            found = table[
                (table["prompt"] == text)
                & (table["site"] == f"resid_post {layer}")
                & (table["level"] == f"{dose} dose")
            ]
            assert found["text"].tolist() == [result.text]
    chunks = {row["chunk"] for row in run.rows.values()}
    assert len(table) == 2 + 12 and len(chunks) == 2  # the unsteered rows, and one batch


def test_a_sweep_that_was_killed_goes_on(folder, tiny_folder):
    """At several moments of its life; at the end its rows are those of one that was not."""
    command(*words(folder, tiny_folder, "whole"))
    arguments = [sys.executable, "-m", "interp_steer", *map(str, words(folder, tiny_folder, "cut"))]
    rows = folder / "cut" / "rows.jsonl"
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if rows.is_file() and len(rows.read_bytes().splitlines()) >= 3:  # the unsteered rows
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.communicate()
    had = rows.read_bytes()
    command(*words(folder, tiny_folder, "cut"))
    assert rows.read_bytes().startswith(had)  # nothing is run again
    assert contents(folder / "cut") == contents(folder / "whole")
    pages = [
        re.sub(r"(cut|whole)|\d\d\d\d-\d\d-\d\d", "", (folder / name / "report.html").read_text())
        for name in ("cut", "whole")
    ]
    assert pages[0].count('class="answers') == pages[1].count('class="answers') == 6


def test_held_out_prompts_make_a_study_of_it(folder, tiny_folder):
    more = {"metrics": "length,rep3", "controls": 2}
    command(*words(folder, tiny_folder, "claimed", metrics="length,rep3"))
    before = contents(folder / "claimed")
    proving = words(folder, tiny_folder, "claimed", prove=folder / "q.txt", **more)
    told = json.loads(command(*proving, "--json")[0])
    assert told["verdict"]["text"].startswith("Nothing is declared")  # so few prompts
    assert contents(folder / "claimed").items() >= before.items()  # the grid was not run again
    table = Run(folder / "claimed").table()
    assert set(table["role"]) >= {"grid", "null_grid", "chosen", "random", "null", "unsteered"}
    assert set(table[table["role"] == "chosen"]["prompt"]) == {
        "I love the dog", "What is the tower", "Name the fruits",
    }  # fmt: skip


def test_the_same_words_find_the_same_folder(folder, tiny_folder, monkeypatch):
    monkeypatch.setenv("INTERP_STEER_CACHE", str(folder / "cache"))
    plain = words(folder, tiny_folder)
    at = plain.index("--out")
    plain = (*plain[:at], *plain[at + 2 :], "--json")
    told = [json.loads(command(*plain)[0])["folder"] for _ in range(2)]
    assert told[0] == told[1] and os.path.basename(told[0]).startswith("d-")
    other = json.loads(command(*plain, "--seed", 3)[0])["folder"]
    assert other != told[0]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--steer", "add(d, {1,2) at 3"], "'{' without its other brace"),
        (["--steer", "add(e, 1) at {1-3}"], "unknown direction 'e'"),
        (["--steer", "add(d, 1) at {1-3}", "--metrics", "concpt"], "nearest: concept"),
        (["--steer", "add(d, 1) at {1-3}", "--metrics", "concept"], "needs the study's `concept`"),
        (["--steer", "add(d, 1) at {1-3}", "--prove", "q.txt"], "give --concept or --metrics"),
        (["--steer", "add(d, 1) at 1", "--prompts", "gone.txt"], "gone.txt"),
        ([], "nothing to sweep"),
    ],
)
def test_mistakes_are_said_before_a_model_loads(folder, more, expected):
    line = error(
        2, "sweep", "--prompt", "I love", "--direction", f"d={folder}/d.safetensors",
        "--model", folder / "gone", *more,
    )  # fmt: skip
    assert expected in line
