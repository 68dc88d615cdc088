"""What a run's folder says of its study."""

import json

import pytest
import torch

from interp_steer.prompts.item import Item
from interp_steer.steering.contrast import Contrast
from interp_steer.study.cell import Controls
from interp_steer.study.description import Description, write
from interp_steer.study.file import StudyFile
from tests.study.samples import direction, four_cells


def test_a_written_study_reads_back(tiny, tmp_path):
    g = torch.Generator().manual_seed(1)
    contrast = Contrast(
        torch.randn(6, 4, 64, generator=g), torch.randn(6, 4, 64, generator=g), {"model": "m"}
    )
    made = four_cells(
        directions={"d": direction(), "c": contrast},
        prove=[Item("What is", positive=" a", negative=" b"), (("user", "hi"),)],
        neutral=["one two three four"],
        limits={"length": 1.0},
        lines=["add(d, 2.0) at 1"],
        controls=Controls(random=3),
        seeds=[0, 1],
        system="Be brief.",
        question="Why: is it? # no comment",
    ).bound(tiny)
    (tmp_path / "directions").mkdir()
    path = write(made, tiny, tmp_path)
    back = StudyFile.read(path).study(tiny)
    assert back.settings == made.settings
    assert list(back.items()) == list(made.items())
    assert list(back.bound(tiny).items()) == list(made.items())  # chats already
    assert back.directions["d"] == made.directions["d"]
    assert torch.equal(back.directions["c"].positive, contrast.positive)
    for name in (
        "controls",
        "sampling",
        "limits",
        "seeds",
        "metrics",
        "question",
        "chunk",
        "lines",
    ):
        assert getattr(back, name) == getattr(made, name), name


ABOUT = {"model": "m", "dtype": "float32"}


def described(folder, made, tiny, *arguments) -> Description:
    return Description(folder, made.bound(tiny), tiny, ABOUT, arguments)


def files(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".lock")
    }


def test_a_folder_is_described_once(tiny, tmp_path):
    made = described(tmp_path, four_cells(), tiny, "in", "these", "words")
    assert not made.same
    made.begin(["one", "two"])
    before = files(tmp_path)
    assert set(before) == {
        "study.yaml", "manifest.json", "plan.jsonl", "directions/d.safetensors",
    }  # fmt: skip
    assert before["plan.jsonl"] == b"one\ntwo\n"
    manifest = json.loads(before["manifest.json"])
    assert manifest["arguments"] == ["in", "these", "words"] and manifest["about"] == ABOUT
    again = described(tmp_path, four_cells(question="Another one?"), tiny)
    assert again.same  # the question decides no row
    again.begin(["three"])
    for name in ("study.yaml", "plan.jsonl"):
        assert files(tmp_path)[name] == before[name]


@pytest.mark.parametrize(
    "changes",
    [
        {"coefficients": [1, 2]}, {"prove": ["What is", "Name two"]}, {"seeds": [1]},
        {"directions": {"d": direction(1)}}, {"metrics": ["length", "rep3"]}, {"chunk": 3},
        {"controls": Controls(random=3)},
    ],
)  # fmt: skip
def test_another_study_is_another_description(tiny, tmp_path, changes):
    described(tmp_path, four_cells(), tiny).begin(["old"])
    before = files(tmp_path)
    other = described(tmp_path, four_cells(**changes), tiny)
    assert not other.same
    other.plan(["new"])  # nothing is written before its first row
    assert files(tmp_path) == before
    other.begin(["new"])
    assert files(tmp_path)["plan.jsonl"] == b"new\n"
    assert described(tmp_path, four_cells(**changes), tiny).same
    assert not described(tmp_path, four_cells(), tiny).same


def test_a_plan_grows_until_it_is_done(tiny, tmp_path):
    made = described(tmp_path, four_cells(), tiny)
    made.begin(["a", "b", "c"])
    for lines, done, left in (
        (["a"], False, b"a\nb\nc\n"),  # another shard has come further
        (["a", "b", "c", "d"], False, b"a\nb\nc\nd\n"),
        (["a", "x"], False, b"a\nx\n"),
        (["a"], True, b"a\n"),
    ):
        made.plan(lines, done=done)
        assert (tmp_path / "plan.jsonl").read_bytes() == left


def test_the_first_run_pins_the_threads(tiny, tmp_path):
    before = torch.get_num_threads()
    described(tmp_path, four_cells(), tiny).begin()
    torch.set_num_threads(before + 1)
    try:
        later = described(tmp_path, four_cells(chunk=3), tiny)
    finally:
        torch.set_num_threads(before)
    assert later.manifest["threads"] == before


def test_failures_of_shards_go_when_a_whole_run_is_through(tiny, tmp_path):
    made = described(tmp_path, four_cells(), tiny)
    failure = {"key": "k", "what": "a row", "why": "it broke"}
    made.failures([failure], "-1-of-2", done=True)
    made.failures([], "-2-of-2", done=True)
    made.failures([failure], "", done=False)
    assert len(list(tmp_path.glob("failures*.json"))) == 3
    made.failures([failure], "", done=True)
    (path,) = tmp_path.glob("failures*.json")
    assert path.name == "failures.json" and json.loads(path.read_text()) == [failure]
