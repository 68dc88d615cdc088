"""A search for strengths that is killed ten times goes on to the same result."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.study.samples import WORDS, direction

PROMPTS = [f"I love the {word}" for word in WORDS[:4]]
HELD_OUT = [f"Name the {word}, please" for word in WORDS]
LINES = ["add({d,e}, ? dose) at {1-4}", "rotate(d, e, ? deg) at {1-3}"]


def searched(model, folder):
    """Chunks of 8 rows, so that a kill meets the search between them and inside."""
    from interp_steer.tune.equal import equal_kl

    known = {"d": direction(), "e": direction(1)}
    return equal_kl(model, LINES, PROMPTS, known, folder, target=0.02, held_out=HELD_OUT,
                    length=6, chunk=8)  # fmt: skip


def searched_together(model, folder):
    """Several strengths at once, in batches of 4 candidates."""
    from interp_steer.engine.row import Sampling
    from interp_steer.tune.search import search

    known = {"d": direction(), "e": direction(1)}
    line = "add(d, ? dose) at 1; add(e, ? dose) at 2"
    return search(model, line, PROMPTS, known, folder, prove=HELD_OUT, trials=40, batch=4,
                  choose_by="kl_last", limits={"kl_mean": 10.0}, chunk=8,
                  sampling=Sampling(max_new_tokens=6))  # fmt: skip


TABLES = {"searched": "table", "searched_together": "trials"}
SCRIPT = """
import os, random, signal, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from interp_steer.model.model import SteeringModel
from tests.tune.test_kill import {name} as searched

model, folder = SteeringModel.load({model!r}), Path({folder!r})
draw, killed = random.Random(5), 0
size = lambda: sum(path.stat().st_size for path in folder.rglob("rows.jsonl"))
for kill in range(10):
    child = os.fork()  # importing takes longer than the rows
    if not child:
        searched(model, folder)
        os._exit(0)
    before = size()
    while size() <= before:  # until it writes
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.001)
    else:
        time.sleep(draw.uniform(0, 0.5))
        os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] == signal.SIGKILL
searched(model, folder).{attribute}.to_json({table!r}, orient="records")
print(killed)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_a_search_that_is_killed_goes_on_to_the_same_result(tiny, tiny_folder, tmp_path, name):
    table, attribute = tmp_path / "table.json", TABLES[name]
    fields = {
        "name": name,
        "attribute": attribute,
        "tests": str(Path(__file__).parents[2]),
        "model": str(tiny_folder),
    }
    done = subprocess.run(
        [sys.executable, "-c",
         SCRIPT.format(**fields, folder=str(tmp_path / "a"), table=str(table))],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = getattr(globals()[name](tiny, tmp_path / "b"), attribute)
    finally:
        torch.set_num_threads(threads)
    assert json.loads(table.read_text()) == json.loads(alone.to_json(orient="records"))
    for path in (tmp_path / "a").rglob("rows.jsonl"):
        keys = Counter(json.loads(line)["key"] for line in path.read_text().splitlines()[1:])
        assert set(keys.values()) == {1}, "a row was run twice"
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
