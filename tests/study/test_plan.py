"""What a study will cost, and what it says of itself before it runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from interp_steer.engine.engine import Engine
from interp_steer.errors import RequestError
from interp_steer.model.model import SteeringModel
from interp_steer.steering.direction import Direction
from interp_steer.study.cell import Controls
from interp_steer.study.plan import Plan
from tests.conftest import command, config_8b, error, make_llama
from tests.study.samples import direction, four_cells, study


def test_the_plan_says_where_a_coefficient_hardly_steers(tiny):
    median = four_cells(as_chat=False).scale(tiny).medians
    small, edge = 0.019 * min(median[2:4]), 0.021 * max(median[2:4])

    def notes(*coefficients, **changes):
        made = four_cells(coefficients=coefficients, as_chat=False, **changes)
        told = Plan.of(made, tiny, timed=False).notes
        return [note for note in told if "hardly steer" in note]

    (said,) = notes(small, edge, "0.001 dose")
    assert f"{small:g} is 1." in said and f"{edge:g}" not in said and "0.001" not in said
    weak = {"directions": {"d": 0.001 * direction()}}
    (said,) = notes("-1 raw", **weak)
    assert "-1 raw is 0." in said
    assert notes(edge) == notes("0.001 dose") == notes(0) == []
    # a clamp to a small value takes the concept out, which is no small step
    assert notes(small, operators=["clamp"]) == []
    assert notes(lines=[f"add(d, {small}) at 2"], sites=())


def test_the_plan_tells_rows_and_time(tiny):
    made = Plan.of(study(), tiny)
    assert made.rows == {"unsteered": 7, "grid": 18, "prove": 24}
    assert made.chunks == {"unsteered": 1, "grid": 3, "prove": 4}
    assert made.seconds is not None and made.seconds > 0
    assert made.memory > made.weights > 0


def test_controls_that_cannot_be_had_are_told_before_anything_runs(tiny, tmp_path):
    source = {"release": "r", "sae_id": "s", "index": "5", "neuronpedia": "nobody/3-res/5"}
    vector = direction().vector
    one = Direction.of(vector, "blocks.2.hook_resid_post", "f", source)
    with pytest.raises(RequestError, match=r"nothing is known of the density.*features: 0"):
        study(directions={"f": one}, controls=Controls(1, 2, 0)).run(tiny, tmp_path / "a")
    assert not (tmp_path / "a").exists()


TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def llama_8b(tiny_folder, tmp_path_factory) -> Path:
    """Llama 3.1 8B's configuration and the tests' tokenizer, without weights."""
    folder = tmp_path_factory.mktemp("llama-8b")
    config_8b().save_pretrained(folder)
    for name in TEXT_FILES:
        shutil.copy(tiny_folder / name, folder)
    return folder


def of_8b(tmp_path: Path, **fields) -> Path:
    """A study file for it: 2 cells, 2 prompts that choose, 3 that prove, 2 controls."""
    vector = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    Direction.of(vector, "blocks.20.hook_resid_post", "d").save(tmp_path / "d.safetensors")
    spec = {
        "directions": {"d": "d.safetensors"},
        "prompts": {
            "choose": ["I love the fox", "I love the dog"],
            "prove": ["Name the rain", "Name the fox", "Name the tower"],
        },
        "sites": "each 20-21",
        "coefficients": ["0.3 dose"],
        "metrics": ["length"],
        "sampling": {"max_new_tokens": 100},
        "controls": {"random": 2, "features": 0, "shuffled": 0},
        "as_chat": False,
    }
    (tmp_path / "s.yaml").write_text(json.dumps({**spec, **fields}))  # JSON is YAML
    return tmp_path / "s.yaml"


def test_8b_is_planned_without_its_weights(llama_8b, tmp_path):
    words = ("study", "plan", of_8b(tmp_path), "--model", llama_8b, "--dtype", "bfloat16")
    planned = json.loads(command(*words, "--json")[0])
    assert planned["weights"] == 2 * 8_030_261_248  # parameters as Meta counts them
    assert planned["rows"]["unsteered"] == 5 and planned["rows"]["grid"] == 4
    assert planned["seconds"] is None
    out, _ = command(*words)
    assert "of which 16.06 GB are weights" in out and "time    about" not in out
    assert "the model's weights are not here; the study's time" in out
    # on a GPU the cache is whole while a long prompt is read; this machine need not have one
    prompts = {name: [f"I {name} the fox. " * 40] for name in ("choose", "prove")}
    of_8b(tmp_path, prompts=prompts, sampling={"max_new_tokens": 20})
    there, here = (
        json.loads(command(*words, "--device", device, "--json")[0]) for device in ("cuda", "cpu")
    )
    assert there["weights"] == here["weights"] == planned["weights"]
    answer = 20 * 32 * 2 * 8 * 128 * 2  # bytes: 20 tokens, 32 blocks, keys and values of 8 heads
    assert there["memory"] - here["memory"] == answer * max(here["rows"].values())


def test_what_needs_weights_is_refused_without_them(llama_8b, tmp_path):
    words = ("--model", llama_8b, "--dtype", "bfloat16")
    assert "has no .safetensors weights" in error(2, "study", "run", of_8b(tmp_path), *words)
    sides = {"d": {"positive": ["I love the fox"], "negative": ["I hate the fox"]}}
    said = error(2, "study", "plan", of_8b(tmp_path, directions=sides), *words)
    assert "need the model's weights" in said
    said = error(2, "study", "plan", of_8b(tmp_path, sites="each 31-32"), *words)
    assert "layer 32 is out of range" in said
    model = SteeringModel.load(llama_8b, weights=False)
    with pytest.raises(RequestError, match="has no weights"):
        Engine(model)


@pytest.mark.parametrize("tied", [True, False])
def test_a_plan_without_weights_is_the_plan_with_them(tmp_path, tied):
    folder = make_llama(tmp_path / "whole", tie_word_embeddings=tied)
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    whole = SteeringModel.load(folder, weights=False, device="cpu")
    assert whole.has_weights  # they are on this machine
    planned = [
        Plan.of(study(), model, timed=False, device="cpu")
        for model in (whole, SteeringModel.load(bare, weights=False, device="cpu"))
    ]
    shown = [(one.rows, one.chunks, one.weights, one.memory) for one in planned]
    assert shown[0] == shown[1]
    assert len(planned[1].notes) == len(planned[0].notes) + 1


def test_of_a_model_on_the_hub_only_config_and_tokenizer_are_fetched(
    llama_8b, tiny_folder, tmp_path, monkeypatch
):
    import huggingface_hub

    asked = []

    def snapshot_download(name, **options):  # the hub, which tests do not reach
        asked.append(options["allow_patterns"])
        return str(llama_8b)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    words = ("study", "plan", of_8b(tmp_path), "--model", "meta-llama/Llama-3.1-8B")
    out, _ = command(*words, "--no-timed", "--dtype", "bfloat16")
    assert "of which 16.06 GB are weights" in out
    command("study", "plan", of_8b(tmp_path), "--model", "other/model", "--no-timed")
    assert len(asked) == 2
    assert not any("safetensors" in pattern for patterns in asked for pattern in patterns)
    asked.clear()
    error(2, *words)  # a timed plan needs the weights, which this folder has not
    assert "*.safetensors" in asked[0]


def test_weights_of_which_files_are_missing_are_not_here(llama_8b, tmp_path):
    from interp_steer.model.loading import has_weights

    assert not has_weights(llama_8b)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").touch()
    assert not has_weights(tmp_path)
    (tmp_path / "model-2.safetensors").touch()
    assert has_weights(tmp_path)
