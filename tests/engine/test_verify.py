"""Checks of the contract must be able to fail: on engines, models and passes that are broken."""

import math
from dataclasses import replace

import pytest
import torch

from interp_steer.engine.bench import Bench
from interp_steer.engine.decoding import Decoding
from interp_steer.engine.engine import Engine
from interp_steer.engine.verify import CHECKS, Check
from interp_steer.model.model import SteeringModel
from tests.conftest import make_llama, state

CHECK = dict(CHECKS)
CLEAN = "nothing is left on the model after an exception"
READ_ANSWERS = [
    name
    for name in CHECK
    if not name.startswith(("rotary", "positions", "engine = Tr", "nothing", "last logits"))
]
GREEDY = [name for name in CHECK if name.startswith("greedy")]


@pytest.fixture
def model(tiny_folder) -> SteeringModel:
    """A model of its own, to be changed."""
    return SteeringModel.load(tiny_folder)


def found(bench: Bench, name: str) -> Check:
    return Check(name, *CHECK[name](bench))


def test_a_model_that_stops_at_once_is_checked(model):
    model.hf.generation_config.eos_token_id = list(range(model.d_vocab))
    bench = Bench(model)
    assert {result.token_ids for result in bench.results} == {()}
    for name in READ_ANSWERS:
        assert found(bench, name).passed, name


@pytest.mark.parametrize("finish", ["stop", "length"])
@pytest.mark.parametrize("kept", [0, 5])
def test_an_engine_that_answers_too_little_fails(tiny, monkeypatch, finish, kept):
    generate = Engine.generate

    def less(self, rows, **told):
        results = generate(self, rows, **told)
        return [replace(r, token_ids=r.token_ids[:kept], finish=finish) for r in results]

    bench = Bench(tiny)
    monkeypatch.setattr(Engine, "generate", less)
    assert all(len(result.token_ids) <= kept for result in bench.results)
    for name in GREEDY:
        assert not found(bench, name).passed


def test_an_engine_that_goes_on_after_the_end_fails(model):
    """Its greedy answers hold an id that ends the answers of transformers."""
    bench = Bench(model)
    stop = bench.answers[0][3]
    model.hf.generation_config.eos_token_id = [stop]
    model.__dict__.pop("stop_ids", None)  # told once
    assert stop in model.stop_ids and len(bench.answers[0]) == 12
    for name in GREEDY:
        assert not found(bench, name).passed


def test_another_device_is_compared_with_a_copy_on_the_cpu(tmp_path, monkeypatch):
    model = SteeringModel.load(make_llama(tmp_path, tie_word_embeddings=True))
    name, bench, before = "last logits = those on the CPU", Bench(model), state(model)
    assert CHECK[name](bench) is None  # the model is there itself
    apart = (bench.on_cpu - bench.alone).abs().max()
    assert apart < min(1e-4, bench.close()) and state(model) == before
    monkeypatch.setattr(SteeringModel, "device", torch.device("mps"))
    assert found(bench, name).passed
    bench.alone = bench.alone + 0.1  # of a device whose products are wrong
    assert not found(bench, name).passed


SETTINGS = {
    "num_beams": 3,
    "suppress_tokens": list(range(100, 380)),
    "begin_suppress_tokens": list(range(100, 380)),
    "no_repeat_ngram_size": 1,
    "repetition_penalty": 1.8,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 1,
    "stop_strings": ["e"],
    "sequence_bias": [[[5], 50.0]],
    "bad_words_ids": [[number] for number in range(100, 380)],
    "min_new_tokens": 8,
    "guidance_scale": 2.0,
    "return_dict_in_generate": True,
    "max_length": 5,
}


def test_settings_of_the_generation_config_stay_out_of_the_reference(model):
    """Whatever a model's maker recommends: plain greedy decoding is what is compared."""
    bench = Bench(model)
    kept = model.hf.generation_config
    for key, value in SETTINGS.items():
        standard = getattr(kept, key)
        setattr(kept, key, value)
        assert found(bench, GREEDY[0]).passed, key
        assert model.hf.generation_config is kept and getattr(kept, key) == value
        setattr(kept, key, standard)


def leave_a_hook(model: SteeringModel) -> None:
    model.hf.model.layers[2].register_forward_hook(lambda *_: None)


def leave_a_lens_hook(model: SteeringModel) -> None:
    model.hooked.add_hook("blocks.1.hook_mlp_out", lambda x, hook: None)


def write_to_a_weight(model: SteeringModel) -> None:
    with torch.no_grad():
        model.hf.model.norm.weight[0] += 0.5


def leave_gradients(model: SteeringModel) -> None:
    weight = model.hf.lm_head.weight
    weight.grad = torch.zeros_like(weight)


@pytest.mark.parametrize(
    "sabotage",
    [
        leave_a_hook,
        leave_a_lens_hook,
        write_to_a_weight,
        leave_gradients,
        lambda model: model.hf.train(),
        lambda model: model.hf.set_attn_implementation("eager"),
    ],
    ids=["hook", "lens hook", "weight", "gradient", "training", "attention"],
)
def test_what_is_left_after_an_exception_is_seen(model, monkeypatch, sabotage):
    bench = Bench(model)
    assert found(bench, CLEAN).passed
    step = Decoding.step

    def broken(self, *given, **told):
        try:
            return step(self, *given, **told)
        except Exception:
            sabotage(model)
            raise

    monkeypatch.setattr(Decoding, "step", broken)
    assert not found(bench, CLEAN).passed


def test_a_difference_that_is_no_number_fails():
    assert not Check("x", math.nan, 1.0).passed and not Check("x", math.inf, 1.0).passed
