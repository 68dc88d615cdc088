"""One set of weights, two views: parity, sharing, tokens, refusals."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from interp_steer.errors import RequestError, RunError
from interp_steer.model.hooked import hooked_view
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.prompts.prompt import chat
from tests.conftest import config_8b, hf_streams, make_llama


def hf_hidden(model: SteeringModel, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model.hf.model(ids, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_views_agree_beyond_the_original_context(tiny_folder, dtype):
    model = SteeringModel.load(str(tiny_folder), dtype=dtype)
    ids = torch.randint(4, 300, (2, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mine, other = model.hf(ids).logits.float(), model.hooked(ids).float()
    # 300 positions, 128 of them before the llama3 scaling begins to matter; without it the
    # logits are wrong by more than a tenth of the largest one
    tolerance = 1e-4 if dtype == "float32" else 0.06
    assert (mine - other).abs().max() < tolerance * mine.abs().max()


def test_rope_scaling_is_what_makes_them_agree(tiny):
    wrong = hooked_view(tiny.hf, tiny.shape, tiny.tokenizer)
    for block in wrong.blocks:
        block.attn.cfg.use_NTK_by_parts_rope = False
        sin, cos = block.attn.calculate_sin_cos_rotary(24, 512, base=10000.0)
        block.attn.rotary_sin, block.attn.rotary_cos = sin, cos
    ids = torch.randint(4, 300, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mine, other = tiny.hf(ids).logits, wrong(ids)
    assert (mine - other).abs().max() > 0.1 * mine.abs().max()


def test_every_layer_of_both_views_agrees(tiny):
    ids = torch.randint(4, 300, (1, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        _, cache = tiny.hooked.run_with_cache(ids)
    hidden = hf_hidden(tiny, ids)
    for layer in range(tiny.n_layers):
        pre = cache[Site("resid_pre", layer).hook_name]
        assert torch.allclose(pre, hidden[layer], atol=1e-4)


def test_large_tensors_are_shared(tiny):
    places = {p.untyped_storage().data_ptr() for p in tiny.hf.parameters()}
    copied = [
        name
        for name, p in tiny.hooked.named_parameters()
        if p.untyped_storage().data_ptr() not in places and p.numel() > tiny.d_vocab
    ]
    assert copied == []


def test_block_by_block_equals_the_whole(tiny):
    ids = torch.randint(4, 300, (2, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        x = tiny.embed(ids)
        rotary = tiny.rotary(x, torch.arange(30)[None])
        for layer in range(tiny.n_layers):
            x = tiny.block(layer, x, rotary)
        assert torch.allclose(tiny.unembed(x), tiny.hf(ids).logits, atol=1e-5)


def test_residuals_match_hugging_face(tiny):
    prompts = [tiny.encode("The quick brown fox"), tiny.encode("Name three fruits, please.")]
    streams = [hf_streams(tiny, one.ids) for one in prompts]
    layers = []
    for layer, x, real in tiny.residuals(prompts):
        layers.append(layer)
        for row, one in enumerate(prompts):
            assert int(real[row].sum()) == len(one.ids)
            assert torch.allclose(x[row][real[row]], streams[row][layer + 1][0], atol=1e-4)
    assert layers == [-1, *range(tiny.n_layers)]


def test_llama_31_8b_reaches_the_hooked_transformer_right():
    """The true configuration, without weights: nothing here needs 16 GB."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    config = config_8b()
    with torch.device("meta"):
        hf = LlamaForCausalLM(config).to(torch.bfloat16)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<e>")
    model = SteeringModel(hf, tokenizer, "llama-3.1-8b")
    assert (model.n_layers, model.d_model, model.n_heads, model.n_kv_heads) == (32, 4096, 32, 8)
    assert (model.d_head, model.d_vocab, model.n_ctx) == (128, 128256, 131072)
    hooked = hooked_view(model.hf, model.shape, model.tokenizer)
    config, block = hooked.cfg, hooked.blocks[31]
    assert (config.n_layers, config.d_model, config.n_heads, config.d_head) == (32, 4096, 32, 128)
    assert (config.n_key_value_heads, config.d_mlp, config.d_vocab) == (8, 14336, 128256)
    assert (config.n_ctx, config.rotary_base, config.eps) == (131072, 500000.0, 1e-5)
    assert config.use_NTK_by_parts_rope and config.NTK_original_ctx_len == 8192
    assert (config.NTK_by_parts_factor, config.NTK_by_parts_low_freq_factor) == (8.0, 1.0)
    assert config.NTK_by_parts_high_freq_factor == 4.0
    assert block.attn.W_Q.shape == (32, 4096, 128) and block.attn._W_K.shape == (8, 4096, 128)
    assert block.mlp.W_in.shape == (4096, 14336) and hooked.W_U.shape == (4096, 128256)
    assert hooked.W_U.dtype == torch.bfloat16 and hooked.W_U.is_meta


def test_chat_has_one_bos_and_content_is_the_users_own(tiny):
    one = tiny.encode(chat("Name three fruits. user", "You are a helpful assistant."))
    assert one.ids.count(0) == 1 and one.ids[0] == 0
    said = tiny.decode([i for i, own in zip(one.ids, one.content, strict=True) if own])
    assert said == "You are a helpful assistant.Name three fruits. user"
    text = tiny.tokenizer.decode(one.ids)
    assert text.endswith("<|start|>assistant\n")


def test_an_answer_is_left_open(tiny):
    one = tiny.encode(chat("Yes or no?", answer="Yes, I"))
    assert tiny.tokenizer.decode(one.ids[one.answer :]).strip() == "Yes, I"
    assert tiny.tokenizer.decode(one.ids).endswith("Yes, I")


def test_plain_text_has_its_bos(tiny):
    one = tiny.encode("The fox")
    assert one.ids[0] == 0 and one.ids.count(0) == 1
    assert one.content == (False, *[True] * (len(one.ids) - 1))


def test_content_survives_contents_that_look_like_the_template(tiny):
    said = "assistant\n user <|start|>system"
    one = tiny.encode(chat(said))
    own = "".join(
        tiny.tokenizer.decode([i]) for i, c in zip(one.ids, one.content, strict=True) if c
    )
    assert own == "assistant\n user system"  # special tokens inside are never content


def test_stop_ids_are_all_of_the_list(tiny):
    assert tiny.stop_ids == (1, 3)


@pytest.mark.parametrize("prompt", ["", "   ", chat(" "), ()])
def test_empty_prompts_are_refused(tiny, prompt):
    with pytest.raises(RequestError, match="empty"):
        tiny.encode(prompt)


@pytest.mark.parametrize("prompt", [["user", "hi"], [{"role": "user", "content": "hi"}], None, 3])
def test_what_is_no_prompt_is_refused(tiny, prompt):
    with pytest.raises(RequestError, match="a prompt is text, or messages"):
        tiny.encode(prompt)


def test_a_prompt_longer_than_the_context_is_refused(tiny):
    with pytest.raises(RequestError, match=r"context of .* holds 512"):
        tiny.encode("fox " * 600)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "'yarn'"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "'linear'",
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(changed_config, entries, reason):
    with pytest.raises(RequestError, match=reason):
        SteeringModel.load(changed_config(**entries))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device_map": "auto"}, "device_map"),
        ({"quantization": "4bit"}, "4- and 8-bit"),
        ({"dtype": "float31"}, "nearest: float32"),
        ({"device": "cuda:7"}, "not available"),
    ],
)
def test_options_are_refused_with_the_reason(tiny_folder, options, reason):
    with pytest.raises(RequestError, match=reason):
        SteeringModel.load(str(tiny_folder), **options)


def test_unknown_models(tmp_path):
    with pytest.raises(RequestError, match="nearest: starter"):
        SteeringModel.load("startr")
    with pytest.raises(RequestError, match="unknown model"):
        SteeringModel.load(str(tmp_path / "none"))
    with pytest.raises(RequestError, match=r"no config\.json"):
        SteeringModel.load(str(tmp_path))
    with pytest.raises(RunError, match="no network"):  # the tests run with HF_HUB_OFFLINE
        SteeringModel.load("someone/some-model")


def test_damaged_weights_are_one_line(tiny_folder, tmp_path):
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RunError, match="cannot be loaded") as caught:
        SteeringModel.load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_sites_are_checked_against_the_model(tiny):
    for site, width, reason in [
        (Site("resid_post", 6), 64, "layers 0-5"),
        (Site("z", 0, 4), 24, "heads 0-3"),
        (Site("resid_post", 0), 65, "65 wide"),
        (Site("z", 0, 0), 64, "24 wide"),
    ]:
        with pytest.raises(RequestError, match=reason):
            tiny.check(site, width)


def test_fingerprint_tells_weights_apart(tiny, tiny_folder, tmp_path):
    assert SteeringModel.load(tiny_folder).fingerprint == tiny.fingerprint
    other = make_llama(tmp_path / "other", seed=1)
    assert SteeringModel.load(str(other)).fingerprint != tiny.fingerprint


MEASURE = """
import gc, sys
from interp_steer.model.model import SteeringModel
import transformer_lens, transformers.models.llama.modeling_llama, torch
from tests.conftest import memory

SteeringModel.load(sys.argv[2], dtype="bfloat16")  # first uses of libraries do not count
for copy in (False, True):
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    model = SteeringModel.load(sys.argv[1], dtype="bfloat16")
    if copy:
        copies = {k: v.clone() for k, v in model.hf.state_dict().items()}
        model.hf.load_state_dict(copies, assign=True)
    for view in (model.hf, model.hooked):  # weights that nobody reads stay in the file
        for weight in view.parameters():
            weight.detach().as_strided(((weight.numel() - 1) // 1024 + 1,), (1024,)).max()
    weights = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    print((memory("VmHWM") - before) / weights, weights / 2**20)
    del model, view, weight
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_loading_both_views_peaks_at_one_set_of_weights(tmp_path, tiny_folder):
    """In a process of its own, on a model of 300 MB; a copy made on purpose is seen."""
    with pytest.MonkeyPatch.context() as patch:  # to draw 150 million numbers takes longest of all
        for draw in ("normal_", "uniform_"):
            patch.setattr(torch.Tensor, draw, lambda weight, *_, **__: weight.fill_(0.01))
        folder = make_llama(
            tmp_path / "large", torch.bfloat16, hidden_size=1024, intermediate_size=4096,
            num_hidden_layers=10, num_attention_heads=16, num_key_value_heads=4, head_dim=64,
        )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(tiny_folder)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    (share, megabytes), (copied, _) = (
        map(float, line.split()) for line in done.stdout.splitlines()
    )
    assert megabytes > 290
    assert share <= 1.10 and copied > 1.5, (share, copied)
