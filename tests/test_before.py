"""What earlier code wrote still opens, is reported and goes on: the files of `data/before`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import configuration_utils

from interp_steer.labels import search
from interp_steer.labels.label import Source
from interp_steer.labels.store import Store
from interp_steer.model.model import SteeringModel
from interp_steer.report import report
from interp_steer.report.run import Run
from interp_steer.results.rows import Results
from interp_steer.steering.contrast import Contrast
from interp_steer.steering.direction import Direction, DirectionSet
from interp_steer.study.file import StudyFile

BEFORE = Path(__file__).parent / "data" / "before"


@pytest.fixture(scope="module")
def model() -> SteeringModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(BEFORE)
        patch.setattr(configuration_utils, "__version__", "5.99.0")  # an upgrade
        loaded = SteeringModel.load("model", device="cpu", dtype="float32")
        assert loaded.fingerprint == "52ab4465ca0ac4f1"
    return loaded


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A copy of the folder, to be written to."""
    copy: Path = shutil.copytree(BEFORE, tmp_path / "before")
    return copy


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder, by its name there: when it was changed, and what it holds."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def resumed(model: SteeringModel, folder: Path) -> Run:
    return StudyFile.read(folder / "study.yaml").study(model).run(model, folder)


def test_directions_and_contrasts_open():
    one = Direction.load(BEFORE / "direction.safetensors")
    assert (one.label, one.hook_point) == ("d@98282fb6", "blocks.1.hook_resid_post")
    assert one.source == {"method": "drawn"} and one.max_activation == 4.5
    drawn = 3 * torch.randn(32, generator=torch.Generator().manual_seed(7))
    assert torch.allclose(one.vector, drawn, atol=1e-5)
    several = DirectionSet.load(BEFORE / "set.safetensors")
    assert several.name == "love" and several.layers == (0, 1)
    contrast = Contrast.load(BEFORE / "contrast.safetensors")
    assert contrast.positive.shape == contrast.negative.shape == (2, 3, 32)
    assert contrast.source["fingerprint"] == "52ab4465ca0ac4f1"
    difference = contrast.positive.mean(1) - contrast.negative.mean(1)
    for layer in (0, 1):
        assert torch.allclose(several[layer].vector, difference[layer], atol=1e-6)


def test_a_label_store_opens(before):
    path = before / "labels.db"
    assert [label.id for label in search("dog", store=path)] == ["tiny/1-res/1"]
    with Store(path) as store:
        best = store.best(Source("tiny", "1-res"))
    assert {i: (one.label, one.max_activation) for i, one in best.items()} == {
        0: ("cities of France", 1.0), 1: ("dogs that bark", 2.0), 2: ("rain in the evening", 3.0),
    }  # fmt: skip


def test_a_study_file_opens(model):
    made = StudyFile.read(BEFORE / "study.yaml").study(model)
    assert list(made.directions) == ["d", "love", "told"]
    assert (made.sites, made.coefficients) == (
        ("resid_post 0", "resid_post 1"),
        ("2.0", "0.5 dose"),
    )
    assert len(made.settings) == 3 * 2 * 2 * 2
    assert [len(part) for part in (made.choose, made.prove, made.build)] == [2, 2, 4]
    assert made.limits == {"rep3": 0.5} and made.sampling.top_k == 20
    assert made.controls.random == 2 and made.controls.shuffled == 2


@pytest.mark.parametrize("name", ["run", "concept", "interrupted"])
def test_a_run_is_reported(name, before, tmp_path):
    run = Run(before / name)
    table = run.table()
    roles = table.groupby("role").size().to_dict()
    if name == "interrupted":
        assert roles == {"unsteered": 5, "grid": 4}
    else:
        assert roles == {
            "unsteered": 5, "grid": 8, "chosen": 3, "flip": 3, "wrong_layer": 3, "random": 6,
        }  # fmt: skip
    assert "Does it?" in report.write(run, tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_finished_run_goes_on_without_a_row_run_again(model, before):
    rows = (before / "run" / "rows.jsonl").read_bytes()
    done = resumed(model, before / "run")
    assert (before / "run" / "rows.jsonl").read_bytes() == rows
    assert len(done.table()) == len(done.rows) == 28


def test_an_interrupted_run_goes_on_behind_its_last_whole_chunk(model, before):
    path = before / "interrupted" / "rows.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0] + b"\n"
    done = resumed(model, before / "interrupted")
    assert path.read_bytes().startswith(whole)
    kept = {json.loads(line)["key"] for line in whole.splitlines()[1:]}
    assert len(kept) == 9 and kept < set(done.rows)
    assert set(done.rows) == set(Run(before / "run").rows)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 28  # no row twice


def test_a_run_whose_metric_has_changed_measures_again_or_says_why_not(model, before):
    done = resumed(model, before / "concept")
    table = done.table()
    assert len(table) == 28 and table["concept"].notna().all() and table["rep3"].notna().all()
    old = Results(BEFORE / "concept" / "rows.jsonl").rows
    texts = {(row["item"], row["steer"], row["seed"]): row["text"] for row in old.values()}
    for row in table.to_dict("records"):
        steer = None if row["role"] == "unsteered" else row["steer"]
        assert row["text"] == texts[row["item"], steer, row["seed"]]
