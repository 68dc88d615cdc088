"""Ray gives the same rows as one process, and outlives its workers. Needs the extra `ray`."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from interp_steer.errors import RunError
from interp_steer.report.run import Run
from interp_steer.study.on_ray import on_ray
from tests.study.samples import contents, study

pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="pip install 'interp-steer[ray]'")

POISON = """
import os
from interp_steer.study.metrics import metric

@metric("poison")
def poison(measured):
    if any("tower" in i.text and r.steer for i, r in zip(measured.items, measured.rows)):
        os._exit(9)
    return [1.0] * len(measured.rows)
"""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def workers_of_this_test() -> list[int]:
    """Processes of Ray actors."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ray::_Worker" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_two_workers_give_the_rows_of_one_process(tiny_folder, tiny, tmp_path):
    study().run(tiny, tmp_path / "one")
    mapper = on_ray({"name": str(tiny_folder)}, workers=2)
    study().run(tiny, tmp_path / "two", mapper=mapper)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_killed_worker_is_started_again(tiny_folder, tiny, tmp_path):
    study().run(tiny, tmp_path / "one")
    killed = []

    def kill():
        while not killed:
            rows = tmp_path / "two" / "rows.jsonl"
            if rows.exists() and rows.stat().st_size > 500 and (found := workers_of_this_test()):
                os.kill(found[0], signal.SIGKILL)
                killed.append(found[0])
            time.sleep(0.005)

    threading.Thread(target=kill, daemon=True).start()
    study().run(tiny, tmp_path / "two", mapper=on_ray({"name": str(tiny_folder)}, workers=2))
    assert killed
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_row_that_kills_its_worker_is_listed_and_all_others_are_done(tiny_folder, tiny, tmp_path):
    (tmp_path / "poison.py").write_text(POISON)
    made = study(
        modules=tmp_path / "poison.py", metrics=["poison", "length"], choose_by="length",
        sites=[2], coefficients=[1.0],
    )  # fmt: skip
    mapper = on_ray({"name": str(tiny_folder)}, workers=2)
    with pytest.raises(RunError, match=r"1 rows failed, every other row is done.*worker died"):
        made.run(tiny, tmp_path / "two", mapper=mapper)
    table = Run(tmp_path / "two").table()
    assert len(table.query("role == 'grid'")) == 2  # of three
    assert len(table.query("role == 'chosen'")) == 4
