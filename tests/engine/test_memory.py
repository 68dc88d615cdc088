"""What rows need, and what the machine, a container and Slurm leave."""

import os
from pathlib import Path

import psutil
import pytest
import torch

from interp_steer.engine.memory import chunks, free, working
from interp_steer.model.model import SteeringModel

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
MB = 2**20
NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


class Machine:
    """The files in which Linux says what groups of processes may use."""

    def __init__(self, root: Path, version: int) -> None:
        self.version, self.process, self.cgroups = version, root / "proc", root / "cgroup"
        self.top = self.cgroups / ("memory" if version == 1 else "")

    def runs_in(self, path: str) -> None:
        self.process.mkdir()
        lines = ["9:name=systemd:/elsewhere", f"4:memory:{path}", "0::/"]
        text = "\n".join(lines) if self.version == 1 else f"0::{path}"
        (self.process / "cgroup").write_text(text + "\n")

    def limits(self, path: str, limit: object, use: int, inactive: int = 0) -> None:
        folder = self.top / path
        folder.mkdir(parents=True, exist_ok=True)
        most, current, pages = NAMES[self.version]
        (folder / most).write_text(f"{limit}\n")
        (folder / current).write_text(f"{use}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{pages} {inactive}\nunevictable 0\n")

    @property
    def free(self) -> int:
        return free(CPU, self.process, self.cgroups)


@pytest.fixture(params=[1, 2])
def machine(request, tmp_path: Path) -> Machine:
    return Machine(tmp_path, request.param)


def test_the_tightest_of_nested_limits_counts(machine):
    machine.runs_in("/jobs/mine/now")
    machine.limits("jobs/mine/now", "max" if machine.version == 2 else 2**63 - 4096, 10 * MB)
    machine.limits("jobs/mine", 60 * MB, 20 * MB)
    machine.limits("jobs", 100 * MB, 90 * MB)  # with what others of the group use
    machine.limits("", 80 * MB, 10 * MB)
    assert machine.free == 10 * MB
    machine.limits("jobs", 100 * MB, 50 * MB)
    assert machine.free == 40 * MB
    machine.limits("jobs/mine", 90 * MB, 20 * MB)
    assert machine.free == 50 * MB
    machine.limits("jobs", 190 * MB, 50 * MB)
    machine.limits("jobs/mine/now", 35 * MB, 10 * MB)
    assert machine.free == 25 * MB


def test_file_pages_that_lie_idle_are_free(machine):
    machine.runs_in("/")
    machine.limits("", 60 * MB, 50 * MB, inactive=30 * MB)
    assert machine.free == 40 * MB
    (machine.top / "memory.stat").unlink()
    assert machine.free == 10 * MB
    machine.limits("", 60 * MB, 70 * MB)
    assert machine.free == 0


def test_a_container_that_is_told_its_path_outside(machine):
    machine.runs_in("/docker/0123456789abcdef")
    machine.limits("", 60 * MB, 20 * MB)
    assert machine.free == 40 * MB


@pytest.mark.parametrize("limit", ["max", 2**63 - 4096, "", "much"])
def test_no_limit(machine, limit):
    machine.runs_in("/jobs")
    machine.limits("jobs", limit, 10 * MB)
    assert machine.free > 100 * MB


def test_no_files(machine):
    assert machine.free > 100 * MB
    machine.runs_in("/jobs")
    assert machine.free > 100 * MB


def test_this_machine():
    found, available = free(CPU), psutil.virtual_memory().available
    assert 0 < found < available + 1000 * MB


@pytest.mark.parametrize(
    ("told", "given"),
    [
        ({"MEM_PER_NODE": 4000}, 4000),
        ({"MEM_PER_CPU": 700, "CPUS_ON_NODE": 5}, 3500),
        ({"MEM_PER_NODE": 4000, "MEM_PER_CPU": 700, "CPUS_ON_NODE": 2}, 4000),
        ({"MEM_PER_NODE": 0}, None),
        ({"MEM_PER_CPU": 700}, None),
        ({"MEM_PER_NODE": "all"}, None),
    ],
)
def test_slurm(tmp_path, monkeypatch, told, given):
    for name, value in told.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    found, mine = free(CPU, tmp_path, tmp_path), psutil.Process().memory_info().rss
    wanted = psutil.virtual_memory().available
    if given:
        wanted = min(wanted, given * MB - mine)
    assert abs(found - wanted) < 200 * MB


# --- what rows need -------------------------------------------------------------------------------


def test_one_long_row_does_not_shrink_the_others():
    needs = [1] * 40 + [90] + [1] * 40
    order = [*range(40), *range(41, 81), 40]  # by length
    assert chunks(order, needs, 100) == [order[:80], [40]]
    assert chunks(order, needs, 170) == [order]


def test_rows_keep_their_order_and_fit():
    needs = [30, 10, 60, 50, 40, 10, 70]
    order = [6, 0, 1, 3, 4, 2, 5]
    found = chunks(order, needs, 100)
    assert found == [[6, 0], [1, 3, 4], [2, 5]]
    assert chunks([], needs, 100) == []


def test_a_row_that_is_too_large_is_alone():
    assert chunks([0, 1, 2, 3], [10, 200, 10, 10], 100) == [[0], [1], [2, 3]]
    assert chunks([0, 1], [5, 5], 0) == [[0], [1]]


def test_many_small_rows_are_one_chunk():
    assert chunks(range(1000), [7] * 1000, 7000) == [[*range(1000)]]


def test_bytes_of_a_row(tiny, tiny_folder):
    """The tiny model by hand: 6 blocks, 2 key heads of 24, width 64, MLP 160, 4 bytes a number."""
    cache, layer, passing = 6 * 2 * 2 * 24 * 4, 2 * 2 * 24 * 4, (4 * 64 + 3 * 160) * 4
    logits = 3 * tiny.d_vocab * 4
    assert working(tiny, 100, 0) == 100 * passing
    # most while the prompt is read, of a long cache once rows join, of a short one while it chooses
    assert working(tiny, 100, 110) == 100 * (cache + passing)
    assert working(tiny, 10, 500) == 500 * (cache + layer)
    assert working(tiny, 1, 5) == 5 * cache + logits
    # on a GPU a cache takes its room at once
    half = SteeringModel.load(tiny_folder, dtype="bfloat16")
    assert working(half, 100, 110, GPU) == (110 * cache + 100 * passing) // 2
    assert working(tiny, 100, 110, GPU) == 110 * cache + 100 * passing + 2 * 4 * 100**2 * 4
