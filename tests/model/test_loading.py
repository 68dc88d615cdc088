"""Checkpoints and models in memory that are not what their configuration says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from interp_steer.engine.engine import Engine
from interp_steer.errors import RequestError, RunError
from interp_steer.model.model import SteeringModel
from tests.conftest import make_llama

Tensors = dict[str, torch.Tensor]
LAYERS = "model.layers."


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., str]:
    """A function to a copy of a model's folder with other tensors or entries in config.json."""

    def copy(folder: Path, edit: Callable[[Tensors], Tensors] = dict, **entries: object) -> str:
        target = tmp_path / "edited"
        shutil.copytree(folder, target)
        tensors = edit(load_file(target / "model.safetensors"))
        whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        save_file(whole, target / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, **entries}))
        return str(target)

    return copy


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if k not in names}


def with_biases(tensors: Tensors) -> Tensors:
    return tensors | {
        f"{LAYERS}{n}.self_attn.{part}_proj.bias": torch.ones(width)
        for n in range(6)
        for part, width in [("q", 96), ("k", 48), ("v", 48)]
    }


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_need_scales_are_refused(tiny_folder, edited, kind):
    name = f"{LAYERS}1.mlp.up_proj.weight"
    folder = edited(tiny_folder, lambda tensors: tensors | {name: tensors[name].to(kind)})
    with pytest.raises(RequestError, match=rf"no F32, BF16, F16, F64: {name} (I8|F8_E4M3)"):
        SteeringModel.load(folder)


@pytest.mark.parametrize(
    ("edit", "entries", "said"),
    [
        (
            without(f"{LAYERS}2.mlp.up_proj.weight"),
            {},
            r"lack model\.layers\.2\.mlp\.up_proj\.weight;",
        ),
        (without("lm_head.weight"), {}, r"lack lm_head\.weight;.*tie_word_embeddings"),
        (
            lambda tensors: {f"module.{k}": v for k, v in tensors.items()},
            {},
            r"lack lm_head\.weight, .* and 54 more; they have besides module\.lm_head\.weight",
        ),
        (dict, {"num_hidden_layers": 9}, r"lack model\.layers\.6\..* and 24 more"),
        (dict, {"num_hidden_layers": 4}, r"have besides model\.layers\.4\..* and 15 more"),
        (with_biases, {}, r"have besides model\.layers\.0\.self_attn\.k_proj\.bias.* and 15 more"),
        (
            lambda tensors: tensors | {"model.norm.weight": torch.ones(60)},
            {},
            r"have in another shape model\.norm\.weight \[60\] for \[64\]",
        ),
    ],
    ids=["lost", "no head", "module.", "fewer layers", "more layers", "biases", "shape"],
)
def test_a_checkpoint_of_other_tensors_is_refused(tiny_folder, edited, edit, entries, said):
    with pytest.raises(RunError, match=said) as caught:
        SteeringModel.load(edited(tiny_folder, edit, **entries))
    assert "\n" not in str(caught.value)


def both_views(model: SteeringModel) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([model.encode("The quick brown fox").ids])
    with torch.no_grad():
        assert torch.allclose(model.hooked(ids), model.hf(ids).logits, atol=1e-4)
        return model.hf(ids).logits, model.hf.model(ids).last_hidden_state


def test_frequencies_of_old_checkpoints_do_no_harm(tiny, tiny_folder, edited):
    kept = {f"{LAYERS}{n}.self_attn.rotary_emb.inv_freq": torch.ones(12) for n in range(6)}
    model = SteeringModel.load(edited(tiny_folder, lambda tensors: tensors | kept))
    assert torch.equal(both_views(model)[0], both_views(tiny)[0])


@pytest.mark.parametrize("which", ["without a head", "with the same head", "with its head alone"])
def test_tied_embeddings_are_the_head(tied_folder, edited, which):
    def edit(tensors: Tensors) -> Tensors:
        embeddings = tensors["model.embed_tokens.weight"]
        assert "lm_head.weight" not in tensors
        if which == "with the same head":
            return tensors | {"lm_head.weight": embeddings}
        if which == "with its head alone":
            return without("model.embed_tokens.weight")(tensors) | {"lm_head.weight": embeddings}
        return tensors

    logits, x = both_views(SteeringModel.load(edited(tied_folder, edit)))
    embeddings = load_file(tied_folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.allclose(logits, x @ embeddings.T, atol=1e-4)


def test_a_head_of_its_own_is_used_though_the_config_ties(tied_folder, edited):
    """As transformers 5 does: what is in the file counts."""
    head = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))

    def edit(tensors: Tensors) -> Tensors:
        return tensors | {"lm_head.weight": head[: len(tensors["model.embed_tokens.weight"])]}

    model = SteeringModel.load(edited(tied_folder, edit))
    logits, x = both_views(model)
    assert torch.allclose(logits, x @ head[: model.d_vocab].T, atol=1e-4)


def test_weights_in_several_files(tiny, tiny_folder, tmp_path):
    for file in tiny_folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tiny.hf.save_pretrained(tmp_path, max_shard_size="300KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert torch.equal(both_views(SteeringModel.load(tmp_path))[0], both_views(tiny)[0])
    for cut in (len(files[1].read_bytes()) // 2, 4, 0):
        files[1].write_bytes(files[1].read_bytes()[:cut])
        with pytest.raises(RunError, match=rf"{files[1].name} is damaged or cut short"):
            SteeringModel.load(tmp_path)
    files[1].unlink()
    with pytest.raises(RunError, match=rf"cannot be loaded: No such file.*{files[1].name}"):
        SteeringModel.load(tmp_path)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tiny_folder, edited, number):
    def edit(tensors: Tensors) -> Tensors:
        tensors[f"{LAYERS}3.mlp.up_proj.weight"][5, 7] = number
        return tensors

    with pytest.raises(RunError, match=r"no numbers.*model\.layers\.3\.mlp\.up_proj\.weight;"):
        SteeringModel.load(edited(tiny_folder, edit))


@pytest.mark.parametrize("kept", ["beside the weights", "alone"])
def test_an_adapter_is_refused(tiny_folder, tmp_path, kept):
    folder = tmp_path / "adapted"
    if kept == "beside the weights":
        shutil.copytree(tiny_folder, folder)
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(8, 64)}, folder / "adapter_model.safetensors")
    with pytest.raises(RequestError, match=r"holds an adapter.*merge_and_unload.*or remove"):
        SteeringModel.load(folder)


# --- models in memory -----------------------------------------------------------------------------


def without_layers(hf: LlamaForCausalLM) -> LlamaForCausalLM:
    hf.model.layers = hf.model.layers[:3]
    return hf


def with_a_bias(hf: LlamaForCausalLM) -> LlamaForCausalLM:
    hf.model.layers[0].self_attn.q_proj = torch.nn.Linear(64, 96)
    return hf


def partly(hf: LlamaForCausalLM, **told: object) -> LlamaForCausalLM:
    hf.model.layers[2].to(**told)
    return hf


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_layers, r"not those of its config, which differs in model\.layers\.3\."),
        (with_a_bias, r"differs in model\.layers\.0\.self_attn\.q_proj\.bias:"),
        (lambda hf: partly(hf, dtype=torch.bfloat16), "several dtypes"),
        (lambda hf: partly(hf, device="meta"), r"several devices \(cpu, meta\)"),
        (lambda hf: hf.to(torch.float8_e4m3fn), "weights of torch.float8_e4m3fn"),
        # the frequencies stay rounded, and TransformerLens forms its own
        (lambda hf: hf.half().float(), "rotary frequencies"),
    ],
    ids=["layers", "bias", "dtypes", "devices", "float8", "rounded"],
)
def test_a_model_in_memory_must_be_what_its_config_says(tiny, tiny_folder, change, said):
    hf = change(LlamaForCausalLM.from_pretrained(tiny_folder))
    with pytest.raises(RequestError, match=said):
        SteeringModel(hf, tiny.tokenizer)


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_a_model_without_a_head_is_refused(tiny, kind):
    make = getattr(SteeringModel.__init__, "__wrapped__", SteeringModel.__init__)
    with pytest.raises(RequestError, match=f"is a {kind.__name__}, expected a LlamaForCausalLM"):
        make(object.__new__(SteeringModel), kind(tiny.hf.config), tiny.tokenizer)


def test_what_makes_no_difference_in_memory(tiny, tiny_folder, tied_folder):
    """Training mode, a head that is not tied though the config says so, embeddings added later."""
    training = LlamaForCausalLM.from_pretrained(tiny_folder, attention_dropout=0.5).train()
    assert torch.equal(both_views(SteeringModel(training, tiny.tokenizer))[0], both_views(tiny)[0])
    untied = LlamaForCausalLM.from_pretrained(tied_folder)
    untied.lm_head.weight = torch.nn.Parameter(-untied.lm_head.weight)
    logits, x = both_views(SteeringModel(untied, tiny.tokenizer))
    assert torch.allclose(logits, -x @ untied.model.embed_tokens.weight.T, atol=1e-4)
    wider = LlamaForCausalLM.from_pretrained(tiny_folder)
    wider.resize_token_embeddings(440)
    assert both_views(SteeringModel(wider, tiny.tokenizer))[0].shape[-1] == 440


def test_a_model_without_weights_computes_nothing(tiny, tiny_folder):
    model = SteeringModel(LlamaForCausalLM.from_pretrained(tiny_folder).to("meta"), tiny.tokenizer)
    assert model.n_layers == 6
    with pytest.raises(RequestError, match="has no weights"):
        Engine(model)


def test_a_revision_of_files_on_disk_is_refused(tiny_folder):
    for name in (str(tiny_folder), "starter"):
        with pytest.raises(RequestError, match=r"revision 'v1\.2' .* is a folder"):
            SteeringModel.load(name, revision="v1.2")
