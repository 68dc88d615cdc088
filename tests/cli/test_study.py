"""Studies and ablations on the command line: what is printed, written, and said of mistakes."""

import json

import pandas as pd
import pytest

from interp_steer.errors import RequestError
from interp_steer.steering.direction import Direction
from tests.conftest import command, error
from tests.study.samples import direction

STUDY = """
question: Does it?
model: {model}
directions: {{d: d.safetensors}}
prompts:
  choose: [I love the fox, I love the dog]
  prove: prove.jsonl
  neutral: [one two three four]
sites: each 2-3
coefficients: [0.3 dose]
metrics: [length, rep3, logit_difference, loss]
sampling: {{max_new_tokens: 6}}
controls: {{random: 2, features: 0, shuffled: 0}}
as_chat: false
chunk: 8
"""


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    direction().save(folder / "d.safetensors")
    prove = [
        {"prompt": f"I hate the {w}", "positive": " tower", "negative": " rain"}
        for w in ("rain", "dog", "tower")
    ]
    (folder / "prove.jsonl").write_text("\n".join(map(json.dumps, prove)))
    (folder / "s.yaml").write_text(STUDY.format(model=tiny_folder))
    return folder


def test_from_the_plan_to_the_report(folder):
    out, _ = command("study", "plan", folder / "s.yaml")
    assert "unsteered" in out and "GB are weights" in out and "time    about" in out
    assert "points without intervals" in out and "2 random controls; 50 are usual" in out
    planned = json.loads(command("study", "plan", folder / "s.yaml", "--json")[0])
    run = folder / "run"
    told = json.loads(command("study", "run", folder / "s.yaml", "--out", run, "--json")[0])
    assert told["rows"] == sum(planned["rows"].values())
    assert told["verdict"]["steers"] is None
    assert "Does it?" in (run / "report.html").read_text()
    out, _ = command("study", "run", folder / "s.yaml", "--out", run)
    assert "Nothing is declared" in out and f"{told['rows']} rows in" in out
    command("study", "table", run, "--out", folder / "t.parquet")
    assert len(pd.read_parquet(folder / "t.parquet")) == told["rows"]
    out, _ = command("report", run, "--out", folder / "r.html")
    assert out.strip() == str(folder / "r.html")
    # the folder itself repeats the run
    again = ("study", "run", run / "study.yaml", "--out", folder / "again", "--no-report")
    command(*again)
    assert len((folder / "again" / "rows.jsonl").read_text().splitlines()) == told["rows"] + 1


def test_shards_and_merging(folder):
    for name, shard in (("one", "1/2"), ("two", "2/2")):
        words = ("study", "run", folder / "s.yaml", "--out", folder / name, "--no-report")
        command(*words, "--shard", shard)
    command("study", "merge", folder / "one", folder / "two")
    out, _ = command("study", "run", folder / "s.yaml", "--out", folder / "one")
    assert "rows in" in out and not list((folder / "one").glob("rows-*"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["study", "run", "gone.yaml"], "no study file gone.yaml"),
        (["study", "run", "{s}", "--shard", "3/2"], "expected i/n"),
        (["study", "run", "{s}", "--workers", "2"], "need --ray"),
        (["study", "run", "{s}", "--threads", "0"], "expected at least 1"),
        (["study", "table", "{f}", "--out", "t.csv"], "no run in"),
        (["report", "{f}"], "no run in"),
        (["study", "merge", "{f}/nothing", "{f}"], "no rows in"),
        (["ablate"], "give --prompts"),
        (["ablate", "--prompts", "{f}/prove.jsonl", "--mediate"], "take a run's folder"),
        (["ablate", "{f}", "--prompts", "x"], "take a run's folder"),
        (["ablate", "--prompts", "{f}/prove.jsonl", "--out", "t.xlsx"], ".csv or .parquet"),
        (["ablate", "--model", "{m}", "--prompts", "{f}/prove.jsonl", "--layers", "2-"], "such as"),
        (
            ["ablate", "--model", "{m}", "--prompts", "{f}/prove.jsonl", "--component", "mlp"],
            "nearest: mlp_out",
        ),
        (
            ["ablate", "--model", "{m}", "--prompts", "{f}/prove.jsonl", "--score", "los"],
            "nearest: loss",
        ),
        (
            ["ablate", "--model", "{m}", "--prompts", "{f}/prove.jsonl", "--direction", "gone"],
            "no direction 'gone'",
        ),
    ],
)
def test_mistakes_are_one_line(folder, tiny_folder, words, expected):
    fields = {"f": folder, "s": folder / "s.yaml", "m": tiny_folder}
    assert expected in error(2, *(word.format(**fields) for word in words))


@pytest.mark.parametrize(
    ("told", "workers", "device", "kind", "here", "expected"),
    [
        (None, 1, None, "cpu", 0, 0.0),
        (None, 2, None, "cuda", 2, 1.0),
        (None, 2, "cpu", "cpu", 2, 0.0),
        (0.5, 4, None, "cuda", 2, 0.5),
        (1, 8, None, "cpu", None, 1.0),  # a cluster's workers, not this machine's
        (None, 8, None, "cuda", None, 1.0),
        (None, 3, None, "cuda", 2, "at most 2 do"),
        (1, 1, None, "cpu", 0, "do not fit on this machine's 0"),
        (0.6, 3, None, "cuda", 2, "at most 2 do"),
        (0, 1, None, "cuda", 1, "--device cpu"),
        (0, 1, "cuda:0", "cuda", 1, "workers see no GPU"),
        (1, 1, "cuda:1", "cuda", 2, "as cuda:0"),
        (1, 1, "cpu", "cpu", 1, "--device is cpu"),
        (1.5, 1, None, "cuda", 4, "such as 0.5"),
        (-1, 1, None, "cuda", 4, "expected 0"),
        (float("nan"), 1, None, "cuda", 4, "expected 0"),
    ],
)
def test_gpus_of_each_worker(told, workers, device, kind, here, expected):
    from interp_steer.study.on_ray import gpus_each

    if isinstance(expected, float):
        assert gpus_each(told, workers, device, kind, here) == expected
        return
    with pytest.raises(RequestError, match=expected):
        gpus_each(told, workers, device, kind, here)


def test_the_files_revision_reaches_the_model_and_its_workers(folder, tiny_folder, monkeypatch):
    import contextlib

    from interp_steer.model.model import SteeringModel
    from interp_steer.study import on_ray as ray

    real, asked, workers = SteeringModel.load, [], []

    def load(name, **options):
        asked.append((name, options.pop("revision")))
        loaded = real(str(tiny_folder), **options)
        loaded.name, loaded.revision = name, "c0ffee"
        return loaded

    text = (folder / "s.yaml").read_text().replace(str(tiny_folder), "some/model")
    (folder / "r.yaml").write_text(text + 'revision: "v1.2"\n')
    monkeypatch.setattr(SteeringModel, "load", load)

    def on_ray(again, **_):
        workers.append(again)

        @contextlib.contextmanager
        def here(manifest):
            from interp_steer.engine.engine import Engine
            from interp_steer.study.chunk import Local

            yield Local(Engine(SteeringModel.load(**again)))

        return here

    monkeypatch.setattr(ray, "on_ray", on_ray)
    out = folder / "revised"
    command("study", "run", folder / "r.yaml", "--ray", "--out", out, "--no-report")
    # the workers load the commit that the branch meant when the run began
    assert asked == [("some/model", "v1.2"), ("some/model", "c0ffee")]
    assert workers[0]["revision"] == "c0ffee"
    command("study", "plan", folder / "r.yaml", "--no-timed", "--model", "other/model")
    assert asked[-1] == ("other/model", None)  # the file's revision is of the file's model
    command("study", "plan", out / "study.yaml", "--no-timed")
    assert asked[-1] == ("some/model", "c0ffee")


def test_an_ablation_prints_writes_and_draws(folder, tiny_folder):
    words = ("ablate", "--model", tiny_folder, "--text", "--prompts", folder / "prove.jsonl")
    out, _ = command(*words, "--component", "block", "--component", "mlp_out", "--layers", "0-2,4",
        "--score", "logit_difference", "--out", folder / "a.csv", "--plot", folder / "a.png",
    )  # fmt: skip
    assert "block" in out and "mlp_out" in out
    table = pd.read_csv(folder / "a.csv")
    assert sorted(set(table["layer"])) == [0, 1, 2, 4] and len(table) == 2 * 4 * 3
    assert (folder / "a.png").read_bytes()[:4] == b"\x89PNG"
    d = Direction.load(folder / "d.safetensors")
    told = json.loads(
        command(*words, "--component", "direction", "--direction", folder / "d.safetensors",
            "--json",
        )[0]
    )  # fmt: skip
    assert {row["component"] for row in told} == {"direction"} and d.site.layer == 2


def test_a_runs_steering_is_traced(folder):
    run = folder / "run"  # of the first test, or made here
    command("study", "run", folder / "s.yaml", "--out", run, "--no-report")
    told = json.loads(command("ablate", run, "--mediate", "--json")[0])
    layer = min(row["layer"] for row in told)
    assert {row["component"] for row in told} == {"attn_out", "mlp_out"} and layer >= 3
    out, _ = command("ablate", run, "--propagate")
    assert "estimate" in out and "rises" in out
