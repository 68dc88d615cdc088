"""The commands as a user runs them: output, exit codes, and what is never loaded."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from interp_steer.labels import Store
from interp_steer.labels.label import Source
from interp_steer.labels.rows import Row
from tests.conftest import command

from .server import Neuronpedia, Reply, explanation, exported, neuron

NAME = "llama3.1-8b/15-llamascope-res-32k"
MAIN = "from interp_steer.cli.main import main; main()"
HOSTILE = "\x1b[31m<b>red</b> \x9b2J\u202e dog [bold]x[/bold]"


class Said(NamedTuple):
    stdout: str
    stderr: str


def run(*args: str, code: int = 0) -> Said:
    said = Said(*command("labels", *args, code=code))
    assert "Traceback" not in said.stderr
    if code:
        assert said.stderr.strip().splitlines()[-1].startswith("error: ")
    return said


@pytest.fixture
def filled(server: Neuronpedia) -> Neuronpedia:
    made = [exported(NAME, 1, "a dog"), exported(NAME, 2, HOSTILE), exported(NAME, 7, "a cat")]
    server.put(f"v1/{NAME}/explanations/batch-0.jsonl.gz", made)
    return server


def test_sync_search_show_coverage_and_pack(filled: Neuronpedia, tmp_path: Path):
    synced = json.loads(run("sync", NAME, "--json").stdout)
    assert synced[0]["labels"] == 3 and synced[0]["complete"]
    hits = json.loads(run("search", "cat", "--json").stdout)
    assert [list(hit) for hit in hits] == [["id", "label", "layer", "index", "explainer", "score"]]
    assert hits[0]["id"] == f"{NAME}/7" and hits[0]["layer"] == 15 and hits[0]["index"] == 7
    assert run("search", "zebra", "--json").stdout == "[]\n"
    shown = run("show", f"{NAME}/7").stdout
    for fact in (f"{filled.url}/{NAME}/7", "labelled", "gemini-2.0-flash", "l15r_8x", "ETag"):
        assert fact in shown
    assert "fetched without label" in run("show", f"{NAME}/5").stdout
    assert "never fetched" in run("show", f"{NAME}/9", code=1).stderr
    assert "whole" in run("coverage").stdout
    assert "not synced" in run("coverage", "llama_scope_lxr_8x", "--layers", "3").stdout
    run("pack", str(tmp_path / "p.db"), NAME)
    assert "a cat" in run("search", "cat", "--store", str(tmp_path / "p.db")).stdout


def test_hostile_labels_and_queries_reach_no_terminal(filled: Neuronpedia):
    run("sync", NAME)
    for output in (
        run("search", "dog").stdout,
        run("show", f"{NAME}/2").stdout,
        run("search", "dog", "--json").stdout,
        run("search", "\x1b[31mred\x9b", code=0).stderr,
        run("search", "\x1b[31m", "--source", "\x1b[2J", code=2).stderr,
        run("sync", "../../\x1b[31m/etc", code=2).stderr,
        on_terminal("search", "dog"),
    ):
        # rich's own bold heads are all that may be left of escape codes
        bare = re.sub(r"\x1b\[[01]?m", "", output)
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", bare), repr(bare)
    assert "[bold]x[/bold]" in on_terminal("search", "dog")


def on_terminal(*args: str) -> str:
    """What a command prints on a terminal of 160 columns."""
    pid, handle = pty.fork()
    if pid == 0:
        os.environ |= {"COLUMNS": "160", "TERM": "xterm"}
        os.execv(sys.executable, [sys.executable, "-c", MAIN, "labels", *args])
    output = b""
    try:
        while piece := os.read(handle, 1 << 16):
            output += piece
    except OSError:  # the other end is closed
        pass
    os.waitpid(pid, 0)
    os.close(handle)
    return output.decode()


def test_the_users_mistakes_are_one_line_and_exit_2(filled: Neuronpedia, monkeypatch):
    assert "nearest: llama_scope_lxr_8x" in run("sync", "llama_scope_lxr8x", code=2).stderr
    assert "nearest" in run("sync", NAME + "x", code=2).stderr
    assert "model/source/index" in run("show", "nope", code=2).stderr
    assert "labels sync" in run("search", "dog", code=1).stderr
    assert "choose one" in run("search", "dog", "--remote", "--hybrid", code=2).stderr
    assert "no such file" in run("import", "none.jsonl", code=2).stderr
    monkeypatch.setenv("NEURONPEDIA_URL", "nonsense")
    assert "not an address" in run("sync", NAME, code=2).stderr


def test_a_sync_that_fails_keeps_what_arrived_says_what_is_missing_and_exits_1(filled: Neuronpedia):
    filled.put(f"v1/{NAME}/explanations/batch-1.jsonl.gz", [exported(NAME, 8, "a bird")])
    filled.always[f"/v1/{NAME}/explanations/batch-1"] = Reply(500)
    start = time.monotonic()
    done = run("sync", NAME, "--patience", "1", code=1)
    assert time.monotonic() - start < 5
    assert f"missing: {NAME} explanations/batch-1.jsonl.gz: status 500" in done.stderr
    assert "missing files: 1" in done.stderr
    assert "1 missing" in done.stdout
    assert run("search", "dog").stdout.count("\n") == 3
    assert "not known to be whole: layers 15" in run("search", "dog").stderr


def test_remote_asks_neuronpedia(filled: Neuronpedia):
    said = explanation("x", "dogs far away")
    row = neuron("m", "3-res", 5)
    filled.results["search-all"] = [
        {"modelId": "m", "layer": "3-res", "index": "5", "cosine_similarity": 0.5, "neuron": row}
        | said
    ]
    hits = json.loads(run("search", "dogs", "--remote", "--json").stdout)
    assert hits[0]["id"] == "m/3-res/5" and hits[0]["score"] == 0.5
    assert "at least 3" in run("search", "ab", "--remote", code=2).stderr


def test_search_client_and_help_load_no_model_library(filled: Neuronpedia):
    run("sync", NAME)
    heavy = "{'torch', 'transformer_lens', 'sae_lens', 'transformers', 'numpy', 'pandas'}"
    for args in (["--help"], ["search", "dog"], ["search", "dog", "--json"], ["sync", NAME],
                 ["show", f"{NAME}/1"], ["coverage", "llama_scope_lxr_8x"]):  # fmt: skip
        code = (
            f"import sys; sys.argv = ['interp-steer', 'labels', *{args!r}]\n"
            "from interp_steer.cli.main import main\n"
            "try: main()\n"
            f"except SystemExit as e: sys.exit(e.code or sorted({heavy} & set(sys.modules)) or 0)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, (args, done.stderr)
    cheap = (
        "import sys, interp_steer.cli.main; assert not {'requests', 'sqlite3'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", cheap], check=True)


def test_a_warm_search_is_quick():
    with Store(write=True) as store:
        source = Source.parse(NAME)
        made = [Row(source.model, source.name, i, f"e{i}", f"a dog {i}") for i in range(5000)]
        store.commit(source, "a", "1", made)
        store.finish(source, complete=True)
    times = []
    for _ in range(4):  # the first reads the registry, once
        start = time.monotonic()
        words = [sys.executable, "-c", MAIN, "labels", "search", "dog"]
        subprocess.run(words, capture_output=True, check=True)
        times.append(time.monotonic() - start)
    # 0.5 s is the promise, measured by the benchmark; the margin is for a busy test machine
    assert min(times[1:]) < 1.0, times
