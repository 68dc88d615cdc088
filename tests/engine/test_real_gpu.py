"""On a real GPU, `pytest -m gpu`: the tiny model as on the CPU, and a model in the shape of Llama
3.1 8B that decodes.
"""

import pytest
import torch

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row, Sampling
from interp_steer.model.model import SteeringModel
from interp_steer.steering.direction import Direction
from interp_steer.steering.grammar import parse, steer
from tests.conftest import config_8b
from tests.engine.samples import LINES, PROMPTS, directions
from tests.engine.test_gpu import read_texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    named, sampling = directions(), Sampling(max_new_tokens=8)
    return [Row(prompt, parse(text, named), sampling) for text in LINES for prompt in PROMPTS]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 0.15)])
def test_scores_are_those_of_the_cpu(tiny_folder, rows, dtype, tolerance):
    """The bfloat16 of both devices rounds alike, but sums in another order."""
    both = [
        read_texts(Engine(SteeringModel.load(tiny_folder, dtype=dtype, device=device)), rows)
        for device in ("cuda:0", "cpu")
    ]
    for mine, other in zip(*both, strict=True):
        assert mine.logprobs.device.type == "cpu"
        assert (mine.logprobs - other.logprobs).abs().mean() < tolerance
        assert mine.kl is not None and other.kl is not None
        assert (mine.kl - other.kl).abs().mean() < tolerance


def test_texts_are_those_of_the_cpu(tiny, tiny_folder, rows):
    """In float32; a near tie may part two texts."""
    model = SteeringModel.load(tiny_folder, dtype="float32", device="cuda:0")
    mine, other = (Engine(one).generate(rows) for one in (model, tiny))
    same = sum(a.token_ids == b.token_ids for a, b in zip(mine, other, strict=True))
    assert same >= 0.9 * len(rows)


def test_a_model_of_8b_decodes(tiny):
    """Random weights; the vocabulary is the tiny tokenizer's, the rest as in Llama 3.1 8B."""
    from transformers import LlamaForCausalLM

    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free GPU memory")
    config = config_8b(bos_token_id=0, eos_token_id=[1, 3], dtype=torch.bfloat16)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda:0"):
            hf = LlamaForCausalLM(config)  # normal weights of 0.02, as for training
    finally:
        torch.set_default_dtype(before)
    model = SteeringModel(hf, tiny.tokenizer, "8b")
    assert model.device.type == "cuda" and model.dtype == torch.bfloat16
    vector = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    one = Direction.of(vector, "blocks.15.hook_resid_post")
    sampling = Sampling(max_new_tokens=16)
    rows = [
        Row(PROMPTS[n % 3], (steer("add", one, coefficient=c, at=15),), sampling)
        for n, c in enumerate((0.0, 4.0, 8.0, -8.0))
    ]
    results = Engine(model).generate(rows)
    assert all(result.finish in ("length", "stop") for result in results)
    scores = Engine(model).score(
        [Row(rows[3].prompt), rows[3]], [(5, 6, 7)] * 2, reference=[None, 0], last_logits=True
    )
    assert all(score.logprobs.isfinite().all() for score in scores)
    assert scores[1].kl is not None and scores[1].kl.mean() > 0
