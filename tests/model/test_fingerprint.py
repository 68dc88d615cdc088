"""Weights that change in place: keys, gates and the second view follow."""

import hashlib

import pytest
import torch

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row, Sampling
from interp_steer.errors import RequestError
from interp_steer.model.model import SteeringModel
from interp_steer.steering.direction import Direction
from interp_steer.steering.grammar import parse
from interp_steer.study.cell import Controls
from interp_steer.study.study import Study


@pytest.fixture
def model(tiny_folder) -> SteeringModel:
    """A model of its own, to be changed."""
    return SteeringModel.load(tiny_folder)


@torch.no_grad()
def add(weight: torch.Tensor) -> None:
    weight += 0.01


def add_to_data(weight: torch.Tensor) -> None:
    weight.data.add_(0.01)  # torch does not count this change


@torch.no_grad()
def one_number(weight: torch.Tensor) -> None:
    weight[1, 1] += 0.01  # not among the 64 that are sampled


@pytest.mark.parametrize("change", [add, add_to_data, one_number])
def test_the_fingerprint_follows_weights_changed_in_place(model, change):
    weight = model.hf.model.layers[3].mlp.down_proj.weight
    before, key, kept = model.fingerprint, Row("The fox").key(model), weight.detach().clone()
    change(weight)
    assert model.fingerprint != before and Row("The fox").key(model) != key
    with torch.no_grad():
        weight.copy_(kept)
    assert model.fingerprint == before and Row("The fox").key(model) == key


def test_the_fingerprint_follows_weights_that_are_replaced(model):
    before = model.fingerprint
    norm = model.hf.model.layers[5].input_layernorm
    norm.weight = torch.nn.Parameter(norm.weight.detach() * 2)
    assert model.fingerprint != before


def part_of_data(weight: torch.Tensor) -> None:
    weight.data[1, 1:] = 0  # neither counted by torch nor among those that are sampled


@pytest.mark.parametrize("change", [add, add_to_data, one_number, part_of_data])
def test_a_study_does_not_take_rows_of_other_weights_for_its_own(model, tiny, change, tmp_path):
    """Whether the weights were changed after the model was used or before anything was asked."""
    study = Study(
        choose=[],
        prove=["The fox", "I love the rain"],
        directions={"d": Direction.of(torch.ones(64), "blocks.0.hook_resid_post")},
        sites=0,
        coefficients=[1.0],
        metrics=["length"],
        sampling=Sampling(max_new_tokens=1),
        controls=Controls(random=1, features=0, shuffled=0),
    )
    study.run(tiny, tmp_path / "run")
    change(model.hf.model.layers[3].mlp.down_proj.weight)
    with pytest.raises(RequestError, match=tiny.fingerprint):
        study.run(model, tmp_path / "run")
    other = study.run(model, tmp_path / "other")
    assert other.manifest["about"]["model"] != tiny.fingerprint
    change(model.hf.model.layers[4].mlp.down_proj.weight)
    with pytest.raises(RequestError, match=other.manifest["about"]["model"]):
        study.run(model, tmp_path / "other")


def test_the_fingerprint_is_the_one_of_stored_rows(tiny):
    """Of the configuration and 64 numbers of every matrix."""
    digest = hashlib.sha256(repr(sorted(tiny.hf.config.to_diff_dict().items())).encode())
    for weight in tiny.hf.parameters():
        numbers = weight.detach().flatten().tolist()
        step = max(1, len(numbers) // 64)
        digest.update(torch.tensor(numbers[::step][:64]).numpy().tobytes())
    assert tiny.fingerprint == digest.hexdigest()[:16]


def test_a_gate_is_judged_by_the_weights_as_they_are(model):
    way = Direction.of(torch.randn(64, generator=torch.Generator().manual_seed(1)),
                       "blocks.2.hook_resid_post", "way")  # fmt: skip
    admission = Engine(model).admission

    def cosine() -> float:
        ids = torch.tensor([model.encode("The quick brown fox").ids])
        with torch.no_grad():
            x = model.hf.model(ids, output_hidden_states=True).hidden_states[3][0, 1:]
        return float(torch.cosine_similarity(x, way.unit[None], dim=-1).mean())

    threshold = cosine()
    text = f"add(way, 4) at 1 if cos(way, 2) > {threshold - 1e-4}"
    row = Row("The quick brown fox", parse(text, {"way": way}))
    assert admission.steered(row)[0].interventions
    with torch.no_grad():
        model.hf.model.layers[2].mlp.down_proj.weight -= way.unit[:, None]
        model.hf.model.layers[1].mlp.down_proj.weight *= -1
    assert bool(admission.steered(row)[0].interventions) == (cosine() > threshold - 1e-4)
    assert cosine() < threshold - 1e-2  # else nothing was tried


def test_verdicts_do_not_grow_without_end(tiny, monkeypatch):
    way = Direction.of(torch.ones(64), "blocks.2.hook_resid_post", "way")
    admission = Engine(tiny).admission
    monkeypatch.setattr(type(admission), "KEPT", 4)
    settings = [
        parse(f"add(way, 4) at 1 if cos(way, 2) > {sign}{0.9 + number / 1000}", {"way": way})
        for number in range(10)
        for sign in ("", "-")
    ]
    lives = [admission.take(n, Row("The fox", s), ()) for n, s in enumerate(settings)]
    admission.judge(lives)
    assert [bool(live.steering.interventions) for live in lives] == [False, True] * 10
    assert len(admission._verdicts) == 4
    assert [bool(admission.steered(live.row)[0].count) for live in lives] == [False, True] * 10


def test_the_second_view_follows_weights_that_moved(model):
    ids = torch.tensor([[0, 17, 45, 99]])
    before = model.hooked
    assert model.hooked is before
    for layer in model.hf.model.layers:
        layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight.detach() * 2)
    with torch.no_grad():
        assert torch.allclose(model.hooked(ids), model.hf(ids).logits, atol=1e-4)
        assert not torch.allclose(before(ids), model.hf(ids).logits, atol=1e-2)
    model.hf.half()  # rounds the rotary frequencies, which the second view forms itself
    with pytest.raises(RequestError, match="rotary frequencies"):
        _ = model.hooked
