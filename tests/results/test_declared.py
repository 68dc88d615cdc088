"""Custom metrics: what a run keeps of them, when they are measured anew, and that nothing runs."""

import json
import shutil
import warnings
from contextlib import contextmanager

import pytest
from matplotlib.figure import Figure

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Sampling
from interp_steer.errors import RequestError, RunError, SteerWarning
from interp_steer.report import report
from interp_steer.report.run import Run
from interp_steer.results.built_in import BUILT_IN
from interp_steer.results.declared import of_manifest
from interp_steer.study.cell import Controls
from interp_steer.study.chunk import Local, load_modules
from interp_steer.study.metrics import METRICS, meaning, metric
from interp_steer.study.stages import key_of
from tests.study.test_execution import contents, study

MODULE = '''
from pathlib import Path

from interp_steer import metric

with open(Path(__file__).with_name("marker"), "a") as file:
    file.write("ran\\n")


@metric(kind="mean", better="low", needs="text", unit="shouts", bounds=(0, 5))
def shouting(measured):
    """How loud an answer is."""
    return [{value} for _ in measured.results]
'''


@pytest.fixture(autouse=True)
def cleaned(monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # drawn, but not rendered
    before = dict(METRICS)
    yield
    METRICS.clear()
    METRICS.update(before)


def small(**changes):
    given = {
        "coefficients": ["0.3 dose"], "sites": [1], "sampling": Sampling(max_new_tokens=3),
        "controls": Controls(0, 0, 0, flip=False, wrong_layer=False), "chunk": 32,
    }  # fmt: skip
    return study(**{**given, **changes})


def shouted(path, **changes):
    given = {"modules": [path], "metrics": ["shouting", "length"], "choose_by": "shouting"}
    return small(**{**given, **changes})


def test_an_edited_metric_is_measured_anew(tiny, tmp_path):
    path = tmp_path / "loud.py"
    path.write_text(MODULE.format(value="1.0"))
    folder = tmp_path / "run"
    table = shouted(path).run(tiny, folder).table()
    assert set(table["shouting"]) == {1.0}
    before = contents(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SteerWarning)
        shouted(path).run(tiny, folder)  # nothing has changed
    assert contents(folder) == before
    path.write_text(MODULE.format(value="2.0"))  # of the same length, in the same second
    with pytest.warns(SteerWarning, match="another form of shouting; they are run anew"):
        run = shouted(path).run(tiny, folder)
    assert set(run.table()["shouting"]) == {2.0}
    assert run.findings().verdict is not None
    # back again: those rows are still there
    path.write_text(MODULE.format(value="1.0"))
    after = contents(folder)
    assert set(shouted(path).run(tiny, folder).table()["shouting"]) == {1.0}
    assert contents(folder) == after and len(after) == 2 * len(before)


def test_an_edited_metric_that_fails_leaves_the_run_as_it_was(tiny, tmp_path):
    path = tmp_path / "loud.py"
    path.write_text(MODULE.format(value="1.0"))
    folder = tmp_path / "run"
    said = shouted(path).run(tiny, folder).findings().verdict.text
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    path.write_text(MODULE.format(value="1 / 0"))
    with pytest.raises(RunError, match="division by zero"):
        shouted(path).run(tiny, folder)
    changed = {name for name in before if (folder / name).read_bytes() != before[name]}
    assert changed == {"failures.json"}
    assert Run(folder).findings().verdict.text == said


def test_another_machines_metric_of_that_name_measures_nothing(tiny, tmp_path):
    path = tmp_path / "loud.py"
    path.write_text(MODULE.format(value="1.0"))
    asked = []  # keys that the first metric's file gave

    @contextmanager
    def elsewhere(manifest):
        def mapper(given):
            if not path.read_text().count("2.0"):
                asked.extend(key for chunk in given for key in chunk.keys)
            path.write_text(MODULE.format(value="2.0"))
            load_modules(manifest["modules"])
            return Local(Engine(tiny))(given)

        yield mapper

    with pytest.raises(RunError, match="the file of shouting is another one here"):
        shouted(path).run(tiny, tmp_path / "run", mapper=elsewhere)
    assert asked and not set(asked) & set(contents(tmp_path / "run"))


def test_metrics_of_one_name_in_two_files_are_each_their_own_studys(tiny, tmp_path):
    for name, value in (("a", "1.0"), ("b", "2.0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "loud.py").write_text(MODULE.format(value=value))
    one, other = (shouted(tmp_path / name / "loud.py") for name in "ab")
    assert set(one.run(tiny, tmp_path / "r").table()["shouting"]) == {1.0}
    assert set(other.run(tiny, tmp_path / "s").table()["shouting"]) == {2.0}


def test_a_metric_of_this_session_is_told_from_an_edited_one(tiny, tmp_path):
    def rows(value):
        if value == 1:

            @metric("quiet")
            def quiet(measured):
                return [1.0] * len(measured.rows)
        else:

            @metric("quiet")
            def quiet(measured):
                return [2.0] * len(measured.rows)

        made = small(metrics=["quiet"], choose_by="quiet")
        return set(made.run(tiny, tmp_path).table()["quiet"])

    assert rows(1) == {1.0} and rows(2) == {2.0} and rows(1) == {1.0}


def test_keys_of_built_in_metrics_in_their_first_version_are_what_they_were(tiny):
    made = study().bound(tiny)
    row = next(iter(made.items()))
    from interp_steer.study.cell import Cell, Planned

    planned = Planned(Cell("unsteered"), row[1], row[0], 0)
    # as c87b42c made it for this study: the row's own key and eight digits of what judges it
    key = key_of(made, tiny, planned)
    assert key.count("-") == 1
    import hashlib

    judged = f"{planned.item.id} []"
    assert (
        key
        == made.sampled(planned).key(tiny) + "-" + (hashlib.sha256(judged.encode()).hexdigest()[:8])
    )
    assert meaning(["rep3", "surprise", "kl_mean", "kl_last", "length", "distinct2"], row[1]) == ""
    # those whose numbers have changed their meaning, and only where they are asked
    for name in ("concept", "mention"):
        assert len(meaning([name, "rep3"], row[1])) == 8
    for name in ("propensity", "propensity_per_token", "logit_difference", "accuracy", "loss"):
        assert BUILT_IN[name].version == 2 and meaning([name], row[1]) == ""


def test_a_report_of_a_copied_run_runs_nothing(tiny, tmp_path):
    path = tmp_path / "here" / "loud.py"
    path.parent.mkdir()
    path.write_text(MODULE.format(value="float(len(measured.results)) / 50"))
    marker = path.with_name("marker")
    controls = Controls(2, 0, 0)
    run = shouted(path, controls=controls, sites=[1, 2]).run(tiny, tmp_path / "here" / "run")
    assert marker.read_text() == "ran\n"
    first = report.write(run).read_text()
    kept = run.manifest["measures"]["shouting"]
    assert (kept["better"], kept["unit"], kept["bounds"]) == ("low", "shouts", [0, 5])
    assert len(kept["source"]) == 8 and kept["about"] == "How loud an answer is."
    shutil.copytree(run.folder, tmp_path / "there")
    del METRICS["shouting"]
    for gone in (False, True):  # the file would run, or is gone
        if gone:
            path.unlink()
        else:
            marker.unlink()
        copied = Run(tmp_path / "there")
        text = report.write(copied).read_text()
        assert "shouting" not in METRICS and not marker.exists()
        assert "How loud an answer is. Lower is better." in text
        body = first.replace(str(run.folder), str(copied.folder))
        assert text == body


def test_a_run_from_before_manifests_kept_metrics(tiny, tmp_path):
    path = tmp_path / "loud.py"
    path.write_text(MODULE.format(value="float(len(measured.results)) / 50"))
    concept = {"metrics": ["concept", "shouting", "rep3"], "concept": ["the"]}
    run = shouted(path, **concept).run(tiny, tmp_path / "run")
    file = run.folder / "manifest.json"
    told = json.loads(file.read_text())
    del told["measures"]
    file.write_text(json.dumps(told))
    del METRICS["shouting"]
    (tmp_path / "marker").unlink()
    found = Run(run.folder).findings()
    assert found.measures["rep3"].as_mapping() == BUILT_IN["rep3"].as_mapping()
    assert found.measures["shouting"].better == "unknown"
    assert found.verdict.steers is None and found.verdict.text.startswith("Nothing is declared")
    text = report.write(Run(run.folder)).read_text()
    assert "shouting is not built in and this run does not keep how it is declared" in text
    assert "Which way is better is not known." in text
    assert "concept: measured by an earlier version" in text
    assert not (tmp_path / "marker").exists() and "shouting" not in METRICS


def test_rows_of_an_earlier_version_are_measured_anew_and_said(tiny, tmp_path, monkeypatch):
    from dataclasses import replace

    made = {"metrics": ["mention", "rep3"], "choose_by": "mention", "concept": ["the"]}
    with monkeypatch.context() as patch:
        patch.setitem(METRICS, "mention", replace(METRICS["mention"], version=1))
        small(**made).run(tiny, tmp_path)
    before = contents(tmp_path)
    assert all(key.count("-") == 1 for key in before)
    with pytest.warns(SteerWarning, match="another form of mention"):
        run = small(**made).run(tiny, tmp_path)
    after = contents(tmp_path)
    assert set(before) < set(after) and len(after) == 2 * len(before)
    planned = {one["key"] for one in run.plan}
    assert planned == set(after) - set(before)  # nothing of the two is mixed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "men"}, "kind is 'men'"),
        ({"better": 1}, "better is of type int"),
        ({"bounds": [0]}, "bounds are not two"),
        ({"bounds": ["a", "b"]}, "bounds is of type list"),
        ({"version": "2"}, "version is '2'"),
        ({"needs": "x" * 9_000}, "needs is 'xxx"),
    ],
)
def test_a_damaged_declaration_is_one_line(changes, said):
    kept = {"length": {**BUILT_IN["length"].as_mapping(), **changes}}
    with pytest.raises(RunError, match=said) as caught:
        of_manifest({"metrics": ["length"], "measures": kept}, BUILT_IN)
    assert len(str(caught.value)) < 200


def test_a_module_that_is_not_there_or_cannot_run_is_told(tmp_path):
    with pytest.raises(RequestError, match="no Python file"):
        shouted(tmp_path / "gone.py")
    (tmp_path / "bad.py").write_text("1 / 0")
    with pytest.raises(RequestError, match="cannot be run: ZeroDivisionError"):
        shouted(tmp_path / "bad.py")
