"""Two runs in one folder: in every order no row is lost, no file changed, and one is told."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from interp_steer.cli import main as cli
from interp_steer.cli.study import merge
from interp_steer.engine.row import Sampling
from interp_steer.errors import RequestError, RunError
from interp_steer.report.run import Run
from interp_steer.study.cell import Controls
from interp_steer.study.metrics import METRICS, metric
from interp_steer.study.study import Study
from interp_steer.util.locking import running
from tests.study.samples import contents, direction, study

FILES = ("study.yaml", "manifest.json", "plan.jsonl", "directions/d.safetensors")


def small(dose=0.3, **changes):
    given = {
        "choose": [],
        "sites": [2],
        "coefficients": [f"{dose} dose"],
        "metrics": ["length"],
        "choose_by": "length",
        "controls": Controls(1, 0, 0, flip=False, wrong_layer=False),
        "sampling": Sampling(max_new_tokens=3),
        "chunk": 2,
    }
    return study(**{**given, **changes})  # 12 rows: unsteered, chosen, random


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file but the locks: when it was changed, and what it holds."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock")
    }


def during(when, action, monkeypatch):
    """Does something once while a run measures its scale, or while it runs its second chunk."""
    calls = []

    def once(number):
        calls.append(number)
        if len(calls) == number:
            action()

    if when == "before its rows":
        real = Study.scale
        monkeypatch.setattr(Study, "scale", lambda *given: (once(1), real(*given))[1])
    else:
        real_call = type(METRICS["length"]).__call__
        monkeypatch.setattr(
            type(METRICS["length"]), "__call__", lambda *given: (once(2), real_call(*given))[1]
        )


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    return small(0.3).run(tiny, folder).folder


@pytest.mark.parametrize(
    ("when", "other"),
    [
        ("before its rows", "run"),
        ("before its rows", "changed"),
        ("before its rows", "merge"),
        ("among its rows", "changed"),
        ("among its rows", "shard"),
        ("among its rows", "merge"),
    ],
)
def test_another_in_the_folder_of_a_run_is_refused_and_changes_nothing(
    tiny, tmp_path, monkeypatch, alone, when, other
):
    folder = tmp_path / "run"
    if other == "changed":  # the folder holds rows of another study already
        small(0.2).run(tiny, folder)
    told = []

    def intrude():
        before = state(folder)
        monkeypatch.undo()
        with pytest.raises(RunError, match="is being written by another run") as caught:
            if other == "merge":
                merge(folder, [alone])
            else:
                shard = (1, 2) if other == "shard" else None
                small(0.6).run(tiny, folder, shard=shard)
        told.append(str(caught.value))
        assert state(folder) == before

    during(when, intrude, monkeypatch)
    made = small(0.3).run(tiny, folder)
    assert len(told) == 1 and "\n" not in told[0]
    assert len(made.table()) == 12
    mine = contents(alone)
    assert {key: contents(folder)[key] for key in mine} == mine
    assert "0.3 dose" in (folder / "study.yaml").read_text()
    # and when it has ended, the other one's turn comes
    small(0.6).run(tiny, folder)
    after = contents(folder)
    assert {key: after[key] for key in mine} == mine
    assert len(Run(folder).table()) == 12 and "0.6 dose" in (folder / "study.yaml").read_text()


def test_a_run_and_other_shards_are_kept_apart(tiny, tmp_path, monkeypatch, alone):
    folder = tmp_path / "run"
    told = []

    def intrude():
        before = state(folder)
        monkeypatch.undo()
        for given, shard in ((0.3, None), (0.3, (1, 2)), (0.6, (2, 2))):
            with pytest.raises(RunError, match="is being written by") as caught:
                small(given).run(tiny, folder, shard=shard)
            told.append(str(caught.value))
            assert state(folder) == before
        small(0.3).run(tiny, folder, shard=(2, 2))  # side by side, as an array's jobs are
        assert {name: state(folder)[name] for name in FILES} == {n: before[n] for n in FILES}

    during("among its rows", intrude, monkeypatch)
    small(0.3).run(tiny, folder, shard=(1, 2))
    assert len(told) == 3 and "another study" in told[2]
    small(0.3).run(tiny, folder, shard=(1, 2))
    assert set(Run(folder).rows) == set(contents(alone))
    assert (folder / "plan.jsonl").read_bytes() == (alone / "plan.jsonl").read_bytes()
    before = state(folder)
    small(0.3).run(tiny, folder, shard=(2, 2))
    assert state(folder) == before


def test_a_complete_run_that_is_started_again_writes_nothing(tiny, tmp_path):
    small().run(tiny, tmp_path)
    before = state(tmp_path)
    small().run(tiny, tmp_path)
    small().run(tiny, tmp_path, arguments=["in", "other", "words"])
    assert state(tmp_path) == before


def test_the_folder_means_the_old_study_until_the_new_ones_rows_start(tiny, tmp_path):
    small(0.3).run(tiny, tmp_path)
    before = state(tmp_path)
    with pytest.raises(RequestError):
        small(0.6, sites=[9]).run(tiny, tmp_path)
    assert state(tmp_path) == before

    @metric("never")
    def never(measured):
        raise ValueError("no")

    try:
        new = small(0.6, metrics=["never"], choose_by="never", directions={"d": direction(5)})
        with pytest.raises(RunError, match="rows failed"):
            new.run(tiny, tmp_path)
    finally:
        del METRICS["never"]
    after = state(tmp_path)
    assert {name: after[name] for name in FILES} == {name: before[name] for name in FILES}
    assert "0.3 dose" in (tmp_path / "study.yaml").read_text()
    assert len(Run(tmp_path).table()) == 12
    # a study all of whose rows are there takes its place without a row run again
    small(0.6).run(tiny, tmp_path)
    rows = (tmp_path / "rows.jsonl").read_bytes()
    assert {row["level"] for row in Run(tmp_path).plan} == {"", "0.6 dose"}
    small(0.3).run(tiny, tmp_path)
    assert (tmp_path / "rows.jsonl").read_bytes() == rows
    assert {row["level"] for row in Run(tmp_path).plan} == {"", "0.3 dose"}


@pytest.mark.parametrize(
    "change", [{"earlier": 5}, {"threads": 10**12}, {"threads": 0}, {"versions": 3}, {"cells": -1}]
)
def test_a_damaged_manifest_is_refused_before_anything_runs(tiny, tmp_path, change):
    small().run(tiny, tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    before = state(tmp_path)
    for made in (small(), small(coefficients=["0.6 dose"])):
        with pytest.raises(RunError, match=rf"manifest\.json is damaged: {next(iter(change))} is"):
            made.run(tiny, tmp_path)
    assert state(tmp_path) == before


def test_what_ran_under_other_versions_stays_known(tiny, tmp_path):
    small().run(tiny, tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(manifest))
    small().run(tiny, tmp_path)  # nothing to run: the rows are still what they were
    assert json.loads(path.read_text()) == manifest
    small(0.6).run(tiny, tmp_path)
    after = json.loads(path.read_text())
    assert after["versions"]["torch"] == torch.__version__
    assert [one["versions"]["torch"] for one in after["earlier"]] == ["1.0"]
    assert after["earlier"][0]["written_at"] == manifest["written_at"]


def test_metrics_that_a_shard_measures_anew_are_found(tiny, tmp_path):
    small().run(tiny, tmp_path)
    more = small(metrics=["kl_last", "length"])
    for _ in range(2):
        for i in (1, 2):
            more.run(tiny, tmp_path, shard=(i, 2))
    table = Run(tmp_path).table()
    assert len(table) == 12 and table["kl_last"].notna().all() and table["length"].notna().all()
    before = state(tmp_path)
    more.run(tiny, tmp_path, shard=(1, 2))
    assert state(tmp_path) == before


def test_a_full_disk_is_one_line_and_the_run_goes_on_from_there(tiny, tmp_path, monkeypatch, alone):
    real, calls = os.write, []

    def full(handle, data):
        calls.append(len(data))
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RunError, match="the disk is full") as caught:
        small().run(tiny, tmp_path / "a")
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert len(contents(tmp_path / "a")) == 4  # two chunks
    small().run(tiny, tmp_path / "a")
    assert contents(tmp_path / "a") == contents(alone)


def test_a_folder_that_cannot_be_written_is_one_line(tiny, tmp_path, monkeypatch):
    small().run(tiny, tmp_path)
    before = state(tmp_path)
    real = os.open

    def refused(path, *given, **options):
        if Path(path).parent == tmp_path and given[0] & os.O_RDWR:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, *given, **options)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(RunError, match="the file system is read-only"):
        small().run(tiny, tmp_path)
    monkeypatch.undo()
    assert state(tmp_path) == before


def test_on_the_command_line(tiny, tmp_path, monkeypatch, capsys):
    small().run(tiny, tmp_path)
    words = ["interp-steer", "study", "run", str(tmp_path / "study.yaml"), "--out", str(tmp_path)]

    def said(*more) -> int:
        monkeypatch.setattr(sys, "argv", [*words, *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    assert said() == 0  # writes report.html
    before = state(tmp_path)
    assert said() == 0 and state(tmp_path) == before
    capsys.readouterr()
    for more in ([], ["--shard", "1/2"]):
        with running(tmp_path):
            code = said(*more)
        assert code == 1
        errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert errors == [f"error: {tmp_path} is being written by another run"]
    assert state(tmp_path) == before


SCRIPT = """
import json, os, random, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from interp_steer.errors import RunError
from interp_steer.model.model import SteeringModel
from tests.study.test_two_runs import small

torch.set_num_threads(1)
model = SteeringModel.load({model!r})
draw = random.Random(3)


def started(job, folder, wait):
    child = os.fork()  # importing takes longer than the rows
    if child:
        return child
    time.sleep(wait)
    try:
        small(job["dose"]).run(model, folder, shard=job.get("shard"))
    except RunError as error:
        os.write(1, (json.dumps(str(error)) + chr(10)).encode())  # in one piece
        os._exit(1)
    os._exit(0)


def together(jobs, folder):
    children = [started(job, folder, draw.uniform(0, 0.5)) for job in jobs]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


for n in range(8):
    codes = together([dict(dose=0.3), dict(dose=0.6), dict(dose=0.3)], Path({folder!r}) / f"a{{n}}")
    assert 0 in codes and set(codes) <= {{0, 1}}, codes
for n in range(3):
    jobs = [dict(dose=0.3, shard=(i, 4)) for i in (1, 2, 3, 4)]
    for _ in range(2):  # the choice, and what builds on it, waits for all shards
        assert together(jobs, Path({folder!r}) / f"s{{n}}") == [0] * 4
"""


@pytest.mark.slow
def test_processes_at_once(tiny, tiny_folder, tmp_path):
    fields = {"tests": str(Path(__file__).parents[2]), "model": str(tiny_folder)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(**fields, folder=str(tmp_path))],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert told and all(text.endswith("is being written by another run") for text in told)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dose in (0.3, 0.6):
            small(dose).run(tiny, tmp_path / f"alone{dose}")
    finally:
        torch.set_num_threads(threads)
    alone = {dose: contents(tmp_path / f"alone{dose}") for dose in (0.3, 0.6)}
    for folder in tmp_path.glob("a[0-9]*"):
        if "alone" in folder.name:
            continue
        found = contents(folder)  # of one study or of both, each whole, each row once
        whole = [dose for dose, rows in alone.items() if rows.items() <= found.items()]
        assert whole and found.items() == {k: v for d in whole for k, v in alone[d].items()}.items()
        assert len(Run(folder).table()) == 12
        (level,) = {row["level"] for row in Run(folder).plan} - {""}
        assert float(level.split()[0]) in whole and level in (folder / "study.yaml").read_text()
        if len(whole) == 1:
            assert level == f"{whole[0]} dose"
    for folder in tmp_path.glob("s[0-9]"):
        run = Run(folder)
        assert len(run.table()) == 12 and set(run.rows) == set(alone[0.3])
        assert (folder / "plan.jsonl").read_bytes() == (
            tmp_path / "alone0.3" / "plan.jsonl"
        ).read_bytes()
