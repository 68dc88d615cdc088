"""The block's arithmetic against transformers' own modules and closed formulas."""

import pytest
import torch

from interp_steer import SteeringModel
from interp_steer.errors import RequestError
from interp_steer.model.block import attention, causal, linear, signed

WIDE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("rows", [(1,), (1, 1), (7, 3), (240, 1), (0, 5)])
@pytest.mark.parametrize("dtype", WIDE)
def test_products_are_those_of_double_precision(rows, dtype):
    torch.manual_seed(0)
    module = torch.nn.Linear(48, 40, bias=False, dtype=dtype)
    x = torch.randn(*rows, 48).to(dtype)
    exact = x.double() @ module.weight.double().T
    with torch.no_grad():
        assert torch.allclose(linear(x, module).double(), exact, atol=WIDE[dtype], rtol=WIDE[dtype])
        apart = x[..., ::2]  # as a slice of a larger tensor lies in memory
        half = torch.nn.Linear(24, 40, bias=False, dtype=dtype)
        exact = apart.double() @ half.weight.double().T
        assert torch.allclose(
            linear(apart, half).double(), exact, atol=WIDE[dtype], rtol=WIDE[dtype]
        )


def test_products_have_gradients_where_they_are_asked_for():
    module = torch.nn.Linear(8, 4, bias=False)
    linear(torch.ones(2, 8), module).sum().backward()
    assert torch.equal(module.weight.grad, torch.full((4, 8), 2.0))


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("kind", ["causal", "masked", "every key"])
def test_heads_that_share_keys(new, kind):
    """softmax(q k' / sqrt(d)) v, head by head, in double precision."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, new, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    allowed = torch.ones(2, new, 5, dtype=torch.bool)
    if kind == "causal":
        k, v = k[:, :, :new], v[:, :, :new]
        allowed = allowed[..., :new].tril()
        out = causal(0, q, k, v)
    elif kind == "masked":
        allowed = allowed.tril(5 - new) & (torch.arange(5) >= torch.tensor([[[0]], [[2]]]))
        allowed = allowed | torch.eye(new, 5, dtype=torch.bool)  # a query sees itself: no NaN
        out = attention(q, k, v, allowed[:, None])
    else:
        out = attention(q, k, v)
    for head in range(6):
        scores = q[:, head].double() @ k[:, head // 2].double().mT / 8**0.5
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        assert torch.allclose(
            out[:, :, head].double(), weights @ v[:, head // 2].double(), atol=1e-5
        )


@pytest.mark.parametrize("dtype", WIDE)
def test_a_block_is_hugging_faces(tiny_folder, dtype):
    """Whole, and a position at a time."""
    model = SteeringModel.load(str(tiny_folder), dtype=dtype)
    x = torch.randn(2, 9, model.d_model, generator=torch.Generator().manual_seed(0)).to(dtype)
    positions = torch.arange(9)[None]
    rotary = model.rotary(x, positions)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None].expand(2, 1, 9, 9)
    theirs_rotary = model.hf.model.rotary_emb(x, position_ids=positions)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def next_one(layer, q, k, v):
        kept.append((k, v))
        return attention(q, *(torch.cat(parts, 2) for parts in zip(*kept, strict=True)))

    with torch.no_grad():
        theirs = model.hf.model.layers[1](x, mask, position_embeddings=theirs_rotary)
        mine = model.block(1, x, rotary)
        steps = []
        for at in range(9):
            here = tuple(part[:, :, at : at + 1] for part in rotary)
            steps.append(model.block(1, x[:, at : at + 1], here, next_one))
    assert torch.allclose(mine, theirs, atol=WIDE[dtype], rtol=WIDE[dtype])
    assert torch.allclose(torch.cat(steps, 1), theirs, atol=WIDE[dtype], rtol=WIDE[dtype])


def test_the_sign_of_the_sines():
    cos, sin = torch.ones(1, 2, 4), torch.arange(8.0).view(1, 2, 4)
    assert signed((cos, sin))[1].tolist() == [[[[0, -1, 2, 3], [-4, -5, 6, 7]]]]


def test_adapters_are_refused(tiny_folder):
    model = SteeringModel.load(str(tiny_folder))

    class Adapted(torch.nn.Linear):
        pass

    model.hf.model.layers[2].self_attn.q_proj = Adapted(64, 96, bias=False)
    with pytest.raises(RequestError, match=r"layers\.2\.self_attn\.q_proj.*Adapted.*merge"):
        SteeringModel(model.hf, model.tokenizer)
