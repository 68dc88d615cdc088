"""TransformerLens's own processing: a copy has it, the shared view refuses it."""

import copy

import pytest
import torch

from interp_steer.errors import RequestError
from interp_steer.model.model import SteeringModel
from tests.conftest import make_llama

IDS = torch.tensor([[0, 17, 45, 99, 200, 31, 8]])


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def normed(request, tmp_path_factory: pytest.TempPathFactory) -> SteeringModel:
    """A model whose norms have weights other than one."""
    folder = make_llama(tmp_path_factory.mktemp("normed"), tie_word_embeddings=request.param)
    model = SteeringModel.load(folder)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.hf.named_parameters():
            if "norm" in name:
                weight.copy_(0.5 + torch.rand(weight.shape, generator=draw))
    return model


def attributed(hooked, right: int, wrong: int) -> float:
    """Direct logit attribution as the tutorials do it: every component's part of the final
    stream over the scale of the final norm, times the difference of two columns of W_U."""
    with torch.no_grad():
        _, cache = hooked.run_with_cache(IDS)
        parts = cache.decompose_resid(layer=-1, pos_slice=-1)
        parts = cache.apply_ln_to_stack(parts, layer=-1, pos_slice=-1)
        directions = hooked.tokens_to_residual_directions(torch.tensor([right, wrong]))
        return float((parts[:, 0] @ (directions[0] - directions[1])).sum())


def test_attributions_of_the_folded_copy_add_up(normed):
    with torch.no_grad():
        logits = normed.hf(IDS).logits[0, -1]
    right, wrong = int(logits.argmax()), int(logits.argmin())
    difference = float(logits[right] - logits[wrong])
    assert attributed(normed.folded(), right, wrong) == pytest.approx(difference, abs=1e-3)
    # the shared view has its norms as they are: the tutorial's sum is another number there
    assert abs(attributed(normed.hooked, right, wrong) - difference) > 0.2


def test_the_folded_copy_computes_the_same(normed):
    with torch.no_grad():
        before = normed.hf(IDS).logits
        folded = normed.folded()
        logits = folded(IDS)
    centred = before - before.mean(-1, keepdim=True)
    assert torch.allclose(logits, centred, atol=1e-4)
    assert not torch.allclose(logits, before, atol=1e-2)
    assert folded.cfg.normalization_type == "RMSPre" and not hasattr(folded.ln_final, "w")
    assert torch.allclose(folded.W_U.mean(-1), torch.zeros(64), atol=1e-6)
    # weights of its own, and the model is as it was
    own = {weight.untyped_storage().data_ptr() for weight in folded.parameters()}
    assert not own & {weight.untyped_storage().data_ptr() for weight in normed.hf.parameters()}
    with torch.no_grad():
        assert torch.equal(normed.hf(IDS).logits, before)


def test_a_folded_copy_in_half_precision(tiny_folder):
    model = SteeringModel.load(tiny_folder, dtype="bfloat16")
    with torch.no_grad():
        exact = model.folded()
        assert exact.W_U.dtype == torch.float32
        small = model.folded("bfloat16")
        assert {weight.dtype for weight in small.parameters()} == {torch.bfloat16}
        wanted, found = exact(IDS), small(IDS).float()
    assert (found - wanted).abs().max() < 0.06 * wanted.abs().max()


STATE = ("fold_layer_norm", "center_unembed", "fold_value_biases", "load_state_dict",
         "center_writing_weights", "refactor_factored_attn_matrices")  # fmt: skip
PROCESSING = {
    "process_weights_": lambda hooked: hooked.process_weights_(fold_ln=True),
    "load_and_process_state_dict": lambda hooked: hooked.load_and_process_state_dict(
        hooked.state_dict()
    ),
    "init_weights": lambda hooked: hooked.init_weights(),
    **{
        name: lambda hooked, name=name: getattr(hooked, name)(hooked.state_dict()) for name in STATE
    },
}
MOVING = {
    "half": lambda hooked: hooked.half(),
    "bfloat16": lambda hooked: hooked.bfloat16(),
    "double": lambda hooked: hooked.double(),
    "to dtype": lambda hooked: hooked.to(torch.float16),
    "to device": lambda hooked: hooked.to("meta"),
    "to device object": lambda hooked: hooked.to(torch.device("meta"), print_details=False),
    "type": lambda hooked: hooked.type(torch.float64),
}


@pytest.mark.parametrize("call", [*PROCESSING, *MOVING])
def test_the_shared_view_refuses_what_would_change_it(tiny, call):
    said = r"model\.folded\(\)" if call in PROCESSING else r"SteeringModel\.load"
    before, config = tiny.hf(IDS).logits, copy.deepcopy(tiny.hooked.cfg)
    with pytest.raises(RequestError, match=said):
        (PROCESSING | MOVING)[call](tiny.hooked)
    assert torch.equal(tiny.hf(IDS).logits, before)
    assert tiny.hooked.cfg == config and tiny.hooked.W_E.dtype == torch.float32


def test_moving_to_where_it_is_does_nothing(tiny, capsys):
    places = [weight.data_ptr() for weight in tiny.hooked.parameters()]
    for call in (
        lambda hooked: hooked.to("cpu"), lambda hooked: hooked.cpu(),
        lambda hooked: hooked.float(), lambda hooked: hooked.to(torch.float32),
    ):  # fmt: skip
        assert call(tiny.hooked) is tiny.hooked
    assert [weight.data_ptr() for weight in tiny.hooked.parameters()] == places
