"""A sync that is killed with SIGKILL, again and again, ends as if nothing had happened."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from interp_steer.labels import sync
from interp_steer.labels.store import Store

from .server import Neuronpedia, exported
from .test_sync import FOLDER, NAME, SOURCE, rows

COMMAND = [
    sys.executable,
    "-c",
    "from interp_steer.cli.main import main; main()",
    "labels",
    "sync",
    NAME,
]


@pytest.mark.parametrize(
    ("labels", "kills"), [(10_000, 3), pytest.param(200_000, 10, marks=pytest.mark.slow)]
)
def test_killed_syncs_resume_to_the_same_store(
    server: Neuronpedia,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    labels: int,
    kills: int,
) -> None:
    per_file = 1000 if labels > 10_000 else 100
    files = labels // per_file
    order = sorted(range(labels), key=str)
    for batch in range(files):
        part = order[batch * per_file : (batch + 1) * per_file]
        made = [exported(NAME, i, f"label {i} about thing {i % 977}", batch % 3 + 1) for i in part]
        made += [exported(NAME, i, f"another word on {i}", id=f"second{i}") for i in part[::50]]
        server.put(f"{FOLDER}batch-{batch}.jsonl.gz", made)

    dice = random.Random(os.environ.get("KILL_SEED", "1"))
    seen: list[int] = []
    for _ in range(kills):
        start = len(server.asked("/v1/"))
        # Sixteen files are under way at once, so the first commits come a little later.
        until = start + dice.randint(1, 16 + files // (kills + 1))
        process = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        limit = time.monotonic() + 60
        while len(server.asked("/v1/")) < until and time.monotonic() < limit:
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.1))
        assert process.poll() is None, "the sync ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        try:
            with Store() as store:
                found = store.coverage(SOURCE)
        except Exception:  # killed before the store was made
            seen.append(0)
            continue
        assert not found.complete_at
        assert found.labels == found.batches * per_file + found.batches * (per_file // 50)
        seen.append(found.batches)
    assert seen == sorted(seen) and seen[-1] > 0, seen  # every resume went on from the last

    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    interrupted = rows()
    assert len(interrupted) == labels + labels // 50
    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path / "other"))
    sync(NAME)
    assert rows() == interrupted
    print(f"killed at {seen} of {files} files; {len(interrupted)} rows equal")
    path = tmp_path / "cache" / "labels" / "labels.db"
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
