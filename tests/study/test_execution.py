"""Runs: what is run, in which part, and that nothing is lost, doubled or changed by a crash."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Sampling
from interp_steer.errors import RequestError, RunError
from interp_steer.prompts.item import Item
from interp_steer.report.run import Run
from interp_steer.steering.contrast import Contrast
from interp_steer.steering.direction import Direction
from interp_steer.study.cell import Controls
from interp_steer.study.metrics import METRICS, metric
from interp_steer.study.plan import forecast
from tests.study.samples import WORDS, contents, direction, study


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    return study().run(tiny, folder)


def test_every_part_of_the_plan_is_run_once(done):
    table = done.table()
    counts = table.groupby(["role", "split"]).size().to_dict()
    assert counts == {
        ("unsteered", "choose"): 3,
        ("unsteered", "prove"): 4,
        ("grid", "choose"): 3 * 2 * 3,
        ("chosen", "prove"): 4,
        ("flip", "prove"): 4,
        ("wrong_layer", "prove"): 4,
        ("random", "prove"): 3 * 4,
    }
    assert sum(forecast(study()).values()) == len(table)
    assert set(table[table["role"] == "grid"]["prompt"]) == {i.text for i in study().choose}
    assert not set(table[table["split"] == "prove"]["prompt"]) & set(
        table[table["role"] == "grid"]["prompt"]
    )


def test_rows_are_what_the_engine_gives(done, tiny):
    table = done.table()
    some = table[table["role"].isin(["grid", "random"])].sample(6, random_state=1)
    from interp_steer.engine.row import Row
    from interp_steer.prompts.prompt import chat
    from interp_steer.steering.grammar import parse

    known = {"d": direction(), **{f"d-random{k}": direction().random(k) for k in range(3)}}
    for row in some.to_dict("records"):
        steer = parse(row["steer"], known)
        (alone,) = Engine(tiny).generate(
            [Row(chat(row["prompt"]), steer, Sampling(max_new_tokens=8))]
        )
        assert alone.text == row["text"]
        assert len(alone.token_ids) == row["tokens"] == row["length"]


def test_strengths_in_every_form(done):
    grid = done.table().query("role == 'grid'")
    assert set(grid["dose"].round(4)) == {0.3, 0.6}
    assert grid["coefficient"].equals(grid["coefficient"].abs())
    assert (grid["delta"] - grid["coefficient"]).abs().max() < 1e-3  # an addition's own length
    per = grid.groupby("layer")["coefficient"].nunique()
    assert (per == 2).all()
    unsteered = done.table().query("role == 'unsteered'")
    assert (unsteered["delta"] == 0).all() and unsteered["steer"].isna().all()
    assert (unsteered["kl_mean"] == 0).all()


def test_the_choice_is_the_best_mean_on_choose_within_the_limits(tiny, tmp_path, done):
    table = done.table()
    grid = table.query("role == 'grid'")
    # better is low, so the smallest KL is chosen: recomputed from the table
    means = grid.groupby(["site", "level"])["kl_mean"].mean()
    chosen = table.query("role == 'chosen'").iloc[0]
    assert (chosen["site"], chosen["level"]) == means.idxmin()
    limit = means.sort_values().iloc[2]
    other = study(choose_by="surprise", limits={"kl_mean": float(limit)}).run(tiny, tmp_path / "o")
    picked = other.table().query("role == 'chosen'").iloc[0]
    allowed = means[means <= limit].index
    effects = grid.groupby(["site", "level"])["surprise"].mean()[allowed]
    assert (picked["site"], picked["level"]) == effects.idxmin()
    none = study(limits={"kl_mean": -1.0}).run(tiny, tmp_path / "n")
    assert "chosen" not in set(none.table()["role"])
    assert none.findings().verdict.steers is None


def test_a_second_start_runs_nothing_and_a_larger_grid_only_what_is_new(tiny, tmp_path):
    study().run(tiny, tmp_path)
    before = contents(tmp_path)
    data = (tmp_path / "rows.jsonl").read_bytes()
    study().run(tiny, tmp_path)
    assert (tmp_path / "rows.jsonl").read_bytes() == data
    more = study(coefficients=["0.3 dose", "0.6 dose", "0.9 dose"])
    more.run(tiny, tmp_path)
    after = contents(tmp_path)
    assert {k: after[k] for k in before} == before
    grid = Run(tmp_path).table().query("role == 'grid'")
    assert len(grid) == 27 and len(after) == len(before) + 9


def test_a_new_metric_measures_every_row_again(tiny, tmp_path):
    study(metrics=["length"], choose_by="length").run(tiny, tmp_path)
    made = study(metrics=["length", "rep3"], choose_by="length").run(tiny, tmp_path)
    assert made.table()["rep3"].notna().any()
    assert len({r["key"] for r in made.rows.values()}) == len(made.table())


def test_missing_values_stay_missing(tiny, tmp_path):
    @metric("patchy")
    def patchy(measured):
        return [None if i % 2 else 1.0 for i in range(len(measured.rows))]

    try:
        made = study(metrics=["patchy", "length"], choose_by="length").run(tiny, tmp_path)
        assert made.table()["patchy"].isna().sum() > 5
        made.findings()
    finally:
        del METRICS["patchy"]


def test_a_row_that_fails_is_listed_and_all_others_are_done(tiny, tmp_path):
    @metric("touchy")
    def touchy(measured):
        if any(
            "tower" in item.text and row.steer
            for item, row in zip(measured.items, measured.rows, strict=True)
        ):
            raise ValueError("I cannot stand towers")
        return [1.0] * len(measured.rows)

    try:
        made = study(
            metrics=["touchy", "length"], choose_by="length", sites=[2], coefficients=[1.0, 2.0]
        )
        with pytest.raises(RunError, match=r"2 rows failed, every other row is done.*cannot stand"):
            made.run(tiny, tmp_path)
        table = Run(tmp_path).table()
        assert len(table.query("role == 'grid'")) == 4  # of 6: two on the tower
        assert len(table.query("role == 'chosen'")) == 4
    finally:
        del METRICS["touchy"]
    # once the reason is gone, the next start runs these two alone
    METRICS["touchy"] = METRICS["length"]
    try:
        made.run(tiny, tmp_path)
        assert len(Run(tmp_path).table().query("role == 'grid'")) == 6
    finally:
        del METRICS["touchy"]


def test_a_prompt_that_always_fails_does_not_end_the_run(tiny, tmp_path):
    @metric("touchy")
    def touchy(measured):
        if any("tower" in item.text for item in measured.items):
            raise ValueError("I cannot stand towers")
        return [float(n) for n, _ in enumerate(measured.rows)]

    try:
        made = study(
            metrics=["touchy"], choose_by="touchy", sampling=Sampling(max_new_tokens=1),
            coefficients=[float(n + 1) for n in range(15)], chunk=64,
        )  # fmt: skip
        with pytest.raises(RunError, match=r"46 rows failed, every other row is done.*and 41 more"):
            made.run(tiny, tmp_path)
    finally:
        del METRICS["touchy"]
    listed = json.loads((tmp_path / "failures.json").read_text())
    assert len(listed) == 46 and all("'I love the tower'" in one["what"] for one in listed)
    table = Run(tmp_path).table()
    assert len(table.query("role == 'grid'")) == 2 * 45
    assert len(table.query("split == 'prove'")) == 4 * 7


def test_a_run_that_cannot_succeed_stops_and_says_where(tiny, tmp_path):
    calls = []

    @metric("never")
    def never(measured):
        calls.append(len(measured.rows))
        if measured.rows[0].steer:
            raise ValueError("no")
        return [1.0] * len(measured.rows)

    try:
        made = study(
            metrics=["never"], choose_by="never", sampling=Sampling(max_new_tokens=1),
            coefficients=[float(n + 1) for n in range(10)],
        )  # fmt: skip
        said = r"20 rows failed, the last 20 one after the other, and none of this stage has "
        said += r"succeeded; the run stopped there with 7 rows in .*: no$"
        with pytest.raises(RunError, match=said):
            made.run(tiny, tmp_path)
    finally:
        del METRICS["never"]
    assert sum(calls[1:]) < 90 * 4
    assert len(json.loads((tmp_path / "failures.json").read_text())) == 20
    assert len(Run(tmp_path).table()) == 7


def test_a_run_whose_rows_begin_to_fail_stops(tiny, tmp_path):
    works = [True]

    @metric("once")
    def once(measured):
        if measured.rows[0].steer and not works:
            raise ValueError("broken")
        if measured.rows[0].steer:
            works.clear()
        return [1.0] * len(measured.rows)

    try:
        made = study(
            metrics=["once"], choose_by="once", sampling=Sampling(max_new_tokens=1),
            coefficients=[float(n + 1) for n in range(10)],
        )  # fmt: skip
        with pytest.raises(RunError, match=r"20 rows failed.*and so does one that had succeeded;"):
            made.run(tiny, tmp_path)
    finally:
        del METRICS["once"]


def test_each_shard_lists_its_own_failures(tiny, tmp_path):
    @metric("touchy")
    def touchy(measured):
        if any(word in item.text for item in measured.items for word in ("fox", "tower")):
            raise ValueError("no")
        return [1.0] * len(measured.rows)

    made = study(
        metrics=["touchy"], choose_by="touchy", sampling=Sampling(max_new_tokens=1), sites=[2],
        coefficients=[1.0, 2.0, 3.0], chunk=3,
    )  # fmt: skip
    try:
        for i in (1, 2, 3):
            with pytest.raises(RunError, match=f"every other row of shard {i}/3"):
                made.run(tiny, tmp_path, shard=(i, 3))
    finally:
        del METRICS["touchy"]
    listed = {
        path.name: {one["key"] for one in json.loads(path.read_text())}
        for path in tmp_path.glob("failures*.json")
    }
    assert set(listed) == {f"failures-{i}-of-3.json" for i in (1, 2, 3)}
    assert len(set().union(*listed.values())) == 2 + 6  # unsteered, and three cells of two prompts
    METRICS["touchy"] = METRICS["length"]
    try:
        made.run(tiny, tmp_path)
    finally:
        del METRICS["touchy"]
    assert [path.name for path in tmp_path.glob("failures*.json")] == ["failures.json"]
    assert json.loads((tmp_path / "failures.json").read_text()) == []


def test_shards_together_are_the_whole(tiny, tmp_path):
    study().run(tiny, tmp_path / "whole")
    for _ in range(2):  # the array, and once more: the choice waits for all shards
        for i in (1, 2, 3):
            study().run(tiny, tmp_path / "parts", shard=(i, 3))
    whole = Run(tmp_path / "whole")
    parts = Run(tmp_path / "parts")
    assert set(parts.rows) == set(whole.rows)
    columns = ["role", "item", "site", "level", "text", "kl_mean"]
    pd.testing.assert_frame_equal(whole.table()[columns], parts.table()[columns])


def test_another_model_or_folder_is_told_before_anything_runs(tiny, tmp_path, done, changed_config):
    from interp_steer.model.model import SteeringModel

    other = SteeringModel.load(changed_config(rms_norm_eps=1e-4))
    before = (done.folder / "rows.jsonl").read_bytes()
    with pytest.raises(RequestError, match="another model"):
        study().run(other, done.folder)
    assert (done.folder / "rows.jsonl").read_bytes() == before
    with pytest.raises(RequestError, match="no run in"):
        Run(tmp_path)
    with pytest.raises(RequestError, match="layer 9 is out of range"):
        study(sites=[9]).run(tiny, tmp_path / "a")
    with pytest.raises(RequestError, match="exceed the context"):
        study(sampling=Sampling(max_new_tokens=509)).run(tiny, tmp_path / "a")
    assert not (tmp_path / "a" / "rows.jsonl").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"):
        study().run(tiny, tmp_path / "file")


def test_the_table_goes_to_parquet_and_csv(done, tmp_path):
    table = done.table()
    for suffix, read in ((".parquet", pd.read_parquet), (".csv", pd.read_csv)):
        path = done.save(tmp_path / f"t{suffix}")
        back = read(path)
        assert len(back) == len(table)
        assert back["kl_mean"].to_list() == pytest.approx(table["kl_mean"].to_list())
    with pytest.raises(RequestError, match=r"written as \.parquet or \.csv"):
        done.save(tmp_path / "t.xlsx")


def test_the_manifest_repeats_the_run(done, tiny, tmp_path):
    from interp_steer.study.file import StudyFile

    again = StudyFile.read(done.folder / "study.yaml").study(tiny)
    again.run(tiny, tmp_path)
    assert contents(tmp_path) == contents(done.folder)
    manifest = json.loads((done.folder / "manifest.json").read_text())
    assert manifest["directions"] == {"d": direction().sha}
    assert manifest["threads"] == torch.get_num_threads()


def grid_of_36(model):
    """36 rows of text and nothing else to choose: 3 sites x 2 doses x 6 prompts."""
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    return study(
        choose=[f"I love the {w}" for w in WORDS[:6]],
        prove=["Name three fruits, please"],
        directions={"d": Direction.of(vector, "blocks.2.hook_resid_post")},
        controls=Controls(2, 0, 0),
        chunk=4,
    )


SCRIPT = """
import os, random, signal, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from interp_steer.model.model import SteeringModel
from tests.study.test_execution import grid_of_36

model = SteeringModel.load({model!r})
study = grid_of_36(model)
draw = random.Random(5)
killed = 0
rows = Path({folder!r}) / "rows.jsonl"
for kill in range(10):
    child = os.fork()  # importing takes longer than the rows
    if not child:
        study.run(model, rows.parent)
        os._exit(0)
    size = rows.stat().st_size if rows.exists() else 0
    while rows.exists() is False or rows.stat().st_size <= size:  # until it writes
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.001)
    else:
        time.sleep(draw.uniform(0, {wait}))
        os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] == signal.SIGKILL
study.run(model, rows.parent)
print(killed)
"""


def killed_ten_times(name, model, tmp_path, wait):
    """A run that is killed ten times, against one that was left alone."""
    fields = {"tests": str(Path(__file__).parents[2]), "model": name, "wait": wait}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(**fields, folder=str(tmp_path / "a"))],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        grid_of_36(model).run(model, tmp_path / "b")
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    table = Run(tmp_path / "a").table()
    assert len(table.query("role == 'grid'")) == 36 and len(table) == len(contents(tmp_path / "b"))
    return int(done.stdout)


@pytest.mark.slow
def test_a_run_killed_ten_times_goes_on_bit_equal(tiny, tiny_folder, tmp_path):
    assert killed_ten_times(str(tiny_folder), tiny, tmp_path, wait=0.06) >= 3


@pytest.mark.slow
def test_the_same_with_the_starter(starter, tmp_path):
    assert killed_ten_times("starter", starter, tmp_path, wait=1.5) == 10


def test_contrasts_and_pairs_run_without_text(tiny, tmp_path):
    g = torch.Generator().manual_seed(1)
    contrast = Contrast(torch.randn(6, 4, 64, generator=g), torch.randn(6, 4, 64, generator=g))
    items = [Item(f"I love the {w}", positive=" tower", negative=" rain") for w in WORDS]
    made = study(
        choose=items[:6], prove=items[6:], directions={"d": contrast}, metrics="logit_difference",
        choose_by="", as_chat=False,
    )  # fmt: skip
    run = made.run(tiny, tmp_path)
    assert made.selected == 3  # cheap rows: nulls go through the choice of themselves
    assert set(run.table()["text"]) == {None}
    assert "shuffled" in set(run.table()["role"])


def test_a_run_that_goes_on_reads_each_file_of_rows_once(tiny, tmp_path, monkeypatch):
    made = study(choose=[], sites=[2], coefficients=["0.3 dose"], chunk=2)
    for i in (1, 2):
        made.run(tiny, tmp_path, shard=(i, 2))
    opened = []
    real = Path.open

    def counted(path, *given, **options):
        opened.append(path.name)
        return real(path, *given, **options)

    monkeypatch.setattr(Path, "open", counted)
    made.run(tiny, tmp_path, shard=(1, 2))
    assert opened.count("rows-1-of-2.jsonl") == opened.count("rows-2-of-2.jsonl") == 1
