import hashlib
import json
import re
import shutil
import struct
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from interp_steer.errors import RequestError, RunError, SteerWarning
from interp_steer.features import decoder, hub
from interp_steer.features.feature import Located, feature, locate
from interp_steer.labels import Label, Store, registry
from interp_steer.labels.label import Source
from interp_steer.labels.rows import Row
from interp_steer.steering.direction import Direction, is_name, load
from interp_steer.steering.grammar import steer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
D_IN, D_SAE = 8, 16
SCOPE = ("llama_scope_lxr_8x", "l15r_8x")
ANDY = ("llama-3.1-8b-instruct-andyrdt", "resid_post_layer_15_trainer_1")
GOODFIRE = ("goodfire-llama-3.1-8b-instruct", "layer_19")
TEMPORAL = ("temporal-sae-llama-3.1-8b", "blocks.15.hook_resid_post")
OLD = ("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
SOURCE = "llama3.1-8b/15-llamascope-res-32k"


@pytest.fixture(scope="module")
def kept_registry(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The registry's file in the cache: reading SAELens's own takes a second, so once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERP_STEER_CACHE", str(tmp_path_factory.mktemp("kept")))
        registry._releases.cache_clear()
        registry.entry(*SCOPE)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_registry: None) -> Path:
    """Our cache and the hub's, of this test alone; and no pauses between tries."""
    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "PAUSE", 0.01)
    return tmp_path / "cache"


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stored(names: tuple[str, str], file: str = "") -> Path:
    """Where the hub's cache keeps an SAE's file."""
    entry = registry.entry(*names)
    home = Path(constants.HF_HUB_CACHE) / f"models--{entry.repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    path = home / "snapshots" / COMMIT / entry.path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def put_json(names: tuple[str, str], file: str, content: object) -> None:
    stored(names, file).write_text(json.dumps(content))


def put_scope(names=SCOPE, dtype=torch.bfloat16, **changes) -> Path:
    hook = "blocks.15.hook_resid_post"
    norm = {"in": 10.8, "out": 10.8}
    put_json(names, "hyperparams.json", {
        "d_model": D_IN, "d_sae": D_SAE, "hook_point_in": hook, "hook_point_out": hook,
        "jump_relu_threshold": 0.2, "dataset_average_activation_norm": norm, **changes,
    })  # fmt: skip
    path = stored(names, "checkpoints/final.safetensors")
    path.parent.mkdir(exist_ok=True)
    save_file(
        {
            "encoder.weight": random(D_SAE, D_IN, seed=1, dtype=dtype),
            "encoder.bias": random(D_SAE, seed=2, dtype=dtype),
            "decoder.weight": random(D_IN, D_SAE, seed=3, dtype=dtype),
            "decoder.bias": random(D_IN, seed=4, dtype=dtype),
        },
        path,
    )
    return path


def put_andy(dtype=torch.float32, transposed: bool = False, old: bool = False) -> Path:
    put_json(ANDY, "config.json", {
        "trainer": {"layer": 15, "dict_class": "BatchTopKSAE", "activation_dim": D_IN,
                    "dict_size": D_SAE, "lm_name": "meta-llama/Llama-3.1-8B-Instruct", "k": 4},
        "buffer": {"ctx_len": 128},
    })  # fmt: skip
    matrices = {
        "encoder.weight": random(D_SAE, D_IN, seed=1),
        "decoder.weight": random(D_IN, D_SAE, seed=3),
    }
    if transposed:
        turned = {"W_enc": matrices["encoder.weight"].T, "W_dec": matrices["decoder.weight"].T}
        matrices = {key: value.contiguous() for key, value in turned.items()}
    biases = {"encoder.bias": random(D_SAE, seed=2), "b_dec": random(D_IN, seed=4)}
    state = {key: value.to(dtype) for key, value in {**matrices, **biases}.items()}
    path = stored(ANDY, "ae.pt")
    torch.save(
        {**state, "k": torch.tensor(4), "threshold": torch.tensor(0.1)},
        path,
        _use_new_zipfile_serialization=not old,
    )
    return path


def put_goodfire(monkeypatch: pytest.MonkeyPatch, dtype=torch.float32) -> Path:
    """SAELens hard-codes 65536 features here: its settings alone are made small."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    real = loaders.get_goodfire_config_from_hf
    small = {"d_in": D_IN, "d_sae": D_SAE}
    monkeypatch.setattr(
        loaders, "get_goodfire_config_from_hf", lambda *a, **k: {**real(*a, **k), **small}
    )
    state = {
        "encoder_linear.weight": random(D_SAE, D_IN, seed=1),
        "encoder_linear.bias": random(D_SAE, seed=2),
        "decoder_linear.weight": random(D_IN, D_SAE, seed=3),
        "decoder_linear.bias": random(D_IN, seed=4),
    }
    torch.save({key: value.to(dtype) for key, value in state.items()}, stored(GOODFIRE))
    return stored(GOODFIRE)


def put_temporal(dtype=torch.float32) -> Path:
    import sae_lens.saes.temporal_sae as made

    sae = made.TemporalSAE(
        made.TemporalSAEConfig(d_in=D_IN, d_sae=D_SAE, n_heads=1, bottleneck_factor=2, kval_topk=4)
    )
    state = {key: value.to(dtype).contiguous() for key, value in sae.state_dict().items()}
    state |= {"D": state.pop("W_dec"), "b": state.pop("b_dec")}
    stored(TEMPORAL, "conf.yaml").write_text(
        textwrap.dedent(f"""
        llm: {{dimin: {D_IN}}}
        sae: {{exp_factor: 2.0, n_heads: 1, n_attn_layers: 1, bottleneck_factor: 2, kval_topk: 4,
              sae_diff_type: topk, tied_weights: true, scaling_factor: 0.029}}
        data: {{dtype: float32}}
    """)
    )
    save_file(state, stored(TEMPORAL, "latest_ckpt.safetensors"))
    return stored(TEMPORAL, "latest_ckpt.safetensors")


def put_old(dtype=torch.float32, **changes) -> Path:
    """As SAELens saved before version 6."""
    put_json(OLD, "cfg.json", {
        "hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8, "d_in": D_IN,
        "d_sae": D_SAE, "dtype": "torch.float32", "model_name": "gpt2-small", **changes,
    })  # fmt: skip
    state = {
        "W_enc": random(D_IN, D_SAE, seed=1, dtype=dtype),
        "W_dec": random(D_SAE, D_IN, seed=3, dtype=dtype),
        "b_enc": random(D_SAE, seed=2, dtype=dtype),
        "b_dec": random(D_IN, seed=4, dtype=dtype),
        "scaling_factor": torch.ones(D_SAE, dtype=dtype),
    }
    save_file(state, stored(OLD, "sae_weights.safetensors"))
    return stored(OLD, "sae_weights.safetensors")


def made_sae(kind: str, **more):
    """An SAE of SAELens with random weights."""
    from sae_lens import SAE

    settings = {"architecture": kind, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32"}
    if kind == "topk":
        settings["k"] = 4
    length = more.pop("rows_of", None)
    if "transcoder" in kind:
        settings["apply_b_dec_to_input"] = False
    sae = SAE.from_dict({**settings, **more})
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape))
        if length is not None:
            sae.W_dec *= length / sae.W_dec.norm(dim=-1, keepdim=True)
    return sae


def saved(folder: Path, kind: str = "topk", hook: str = "blocks.3.hook_resid_post", **more) -> Path:
    """An SAE made and saved by SAELens."""
    about = {"hook_name": hook, "model_name": "tiny", **more.pop("metadata", {})}
    made_sae(kind, metadata=about, **more).save_model(folder)
    return folder


def assert_exact(got, want: torch.Tensor) -> None:
    """The direction is that row to the bit: Direction.of(row) is a function of the row alone."""
    from interp_steer.steering.direction import Direction

    assert got == Direction.of(want.float(), got.hook_point)
    assert (got.vector - want.float()).abs().max() <= 1e-6 * want.abs().max()


# --- rows equal SAELens's own -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "put", "hook"),
    [
        (SCOPE, lambda patch: put_scope(), "blocks.15.hook_resid_post"),
        (SCOPE, lambda patch: put_scope(dtype=torch.float32), "blocks.15.hook_resid_post"),
        (ANDY, lambda patch: put_andy(), "blocks.15.hook_resid_post"),
        (ANDY, lambda patch: put_andy(torch.bfloat16), "blocks.15.hook_resid_post"),
        (ANDY, lambda patch: put_andy(transposed=True), "blocks.15.hook_resid_post"),
        (ANDY, lambda patch: put_andy(old=True), "blocks.15.hook_resid_post"),
        (GOODFIRE, put_goodfire, "blocks.19.hook_resid_post"),
        (GOODFIRE, lambda patch: put_goodfire(patch, torch.float16), "blocks.19.hook_resid_post"),
        (TEMPORAL, lambda patch: put_temporal(), "blocks.15.hook_resid_post"),
        (OLD, lambda patch: put_old(), "blocks.8.hook_resid_pre"),
        (OLD, lambda patch: put_old(torch.float16), "blocks.8.hook_resid_pre"),
        (OLD, lambda patch: put_old(torch.bfloat16, normalize_activations=False),
         "blocks.8.hook_resid_pre"),
    ],
)  # fmt: skip
def test_rows_are_those_of_saelens_to_the_bit(names, put, hook, monkeypatch):
    from sae_lens import SAE

    put(monkeypatch)
    sae = SAE.from_pretrained(*names, device="cpu")
    # it divides temporal SAEs' reconstructions as it decodes, and leaves the rows as they are
    factor = sae.cfg.activation_normalization_factor if names == TEMPORAL else None
    for index in (0, 5, D_SAE - 1):
        want = sae.W_dec.detach()[index]
        want = want if factor is None else want / factor
        row = locate(*names).row(index)
        assert row.vector.dtype == torch.float32
        assert row.architecture == sae.cfg.architecture()
        assert (row.vector - want).abs().max().item() == 0.0
        got = feature(*names, index)
        assert_exact(got, want)
        assert got.hook_point == hook
        assert (got.source["revision"], got.source["repo"]) == (COMMIT, registry.entry(*names).repo)


def test_the_scale_of_activations_is_folded_in():
    put_scope(dtype=torch.float32)
    got = feature(*SCOPE, 3)
    raw = random(D_IN, D_SAE, seed=3)[:, 3]
    assert got.norm == pytest.approx(raw.norm().item() / 5.91907514450867, rel=1e-6)
    assert got.source["norm_scaling_factor"] == "5.91907514450867"


def test_a_unit_of_a_temporal_feature_is_what_its_sae_adds():
    from sae_lens import SAE

    put_temporal()
    sae = SAE.from_pretrained(*TEMPORAL, device="cpu")
    one = torch.zeros(2, D_SAE)
    one[1, 4] = 1
    off, on = sae.decode(one)
    assert torch.allclose(on - off, feature(*TEMPORAL, 4).vector, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu", "gated"])
def test_a_folder_that_saelens_saved(kind, tmp_path):
    from sae_lens import SAE

    folder = saved(tmp_path / "mine", kind)
    sae = SAE.load_from_disk(folder, dtype="float32")
    for where in (folder, str(folder)):
        got = feature(where, 12)
        assert_exact(got, sae.W_dec.detach()[12])
        assert got.hook_point == "blocks.3.hook_resid_post"
        assert (got.source["release"], got.source["sae_id"]) == (str(folder), "")
        assert got.name == "f3-12"


def test_a_folder_is_read_anew_when_it_changes(tmp_path, cache):
    folder = saved(tmp_path / "mine")
    before = feature(folder, 1)
    save_file({"W_dec": random(D_SAE, D_IN, seed=9)}, folder / "sae_weights.safetensors")
    assert_exact(feature(folder, 1), random(D_SAE, D_IN, seed=9)[1])
    assert feature(folder, 1) != before
    assert not (cache / "features").exists()


def test_a_scaled_sae_saved_unfolded_says_so(tmp_path):
    from sae_lens import SAE

    folder = saved(tmp_path / "mine", normalize_activations="expected_average_only_in")
    got = feature(folder, 1)
    assert_exact(got, SAE.load_from_disk(folder).W_dec.detach()[1])
    assert got.source["normalize_activations"] == "expected_average_only_in"
    assert feature(saved(tmp_path / "other"), 1).source.get("normalize_activations") is None


def test_layouts_that_only_saelens_reads_are_loaded_whole(monkeypatch):
    places = {"hook_name": "blocks.2.ln2.hook_normalized", "hook_name_out": "blocks.2.hook_mlp_out"}
    inner = made_sae("jumprelu_transcoder", metadata=places, d_out=D_IN)
    monkeypatch.setattr("sae_lens.SAE.from_pretrained", lambda *a, **k: inner)
    release = "gemma-scope-2b-pt-transcoders"
    names = (release, next(iter(registry._releases()[release]["saes"])))
    got = feature(*names, 7)
    assert_exact(got, inner.W_dec.detach()[7])
    assert got.hook_point == "blocks.2.hook_mlp_out"
    with pytest.raises(RequestError, match=rf"{release}/.* has features 0-{D_SAE - 1}$"):
        feature(*names, D_SAE)


@pytest.mark.parametrize(
    ("module", "hook"),
    [
        ("model.layers.3", "blocks.3.hook_resid_post"),
        ("model.layers.3.output", "blocks.3.hook_resid_post"),
        ("layers.3.mlp", "blocks.3.hook_mlp_out"),
        ("model.layers.3.self_attn", "blocks.3.hook_attn_out"),
    ],
)
def test_the_modules_of_transformers_are_places(module, hook, tiny, tiny_folder, tmp_path):
    """Their outputs are what a hook of torch reads there."""
    from transformers import AutoModelForCausalLM

    from interp_steer.features.sae import Sae
    from interp_steer.model.site import Site

    assert Site.parse(module).hook_point == hook
    folder = saved(tmp_path / "mine", hook=module)
    assert feature(folder, 5).hook_point == Sae.load(folder).site.hook_point == hook
    made = Direction(torch.eye(64)[0], module)
    assert load(made.save(tmp_path / "one")) == made and made.hook_point == hook
    seen = []
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype="float32")
    name = module.removeprefix("model.").removesuffix(".output")
    theirs.get_submodule(f"model.{name}").register_forward_hook(
        lambda *a: seen.append(a[2] if isinstance(a[2], torch.Tensor) else a[2][0])
    )
    encoded = tiny.encode("The tower stands in Paris.")
    with torch.no_grad():
        theirs(torch.tensor([encoded.ids]))
    x, _ = tiny.read(Site.parse(module), [encoded])
    torch.testing.assert_close(x[0], seen[0][0], rtol=1e-4, atol=1e-5)


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        (f"{SOURCE}/5",),
        (f"https://www.neuronpedia.org/{SOURCE}/5",),
        (f"http://neuronpedia.org/{SOURCE}/5/",),
        (f"www.neuronpedia.org/{SOURCE}/5?embed=true&x=/1",),
        (f" https://neuronpedia.org/{SOURCE}/5/?a=b#top",),
        (f"{'/'.join(SCOPE)}/5",),
        (SOURCE, 5),
        ("/".join(SCOPE), 5),
        (*SCOPE, 5),
        (Label("llama3.1-8b", "15-llamascope-res-32k", 5, "towers"),),
        (Label("x", "y", 5, "towers", release=SCOPE[0], sae_id=SCOPE[1]),),
    ],
)
def test_one_feature_has_many_names(given):
    put_scope()
    got = feature(*given)
    assert_exact(got, locate(*SCOPE).row(5).vector)
    assert (got.name, got.source["index"]) == ("f15-5", "5")
    assert got.source["neuronpedia"] == f"{SOURCE}/5"
    assert (got.source["release"], got.source["sae_id"]) == SCOPE
    assert got.source["file"] == "Llama3_1-8B-Base-L15R-8x/checkpoints/final.safetensors"
    assert got.source["model"] == "meta-llama/Llama-3.1-8B"


def test_every_form_locates_the_whole_sae(tmp_path, monkeypatch):
    folder = saved(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    entry = Located(registry.entry(*SCOPE))
    for given in (SCOPE, (SOURCE,), (f"https://neuronpedia.org/{SOURCE}",), ("/".join(SCOPE),)):
        assert locate(*given) == entry
        assert (entry.release, entry.sae_id, entry.neuronpedia) == (*SCOPE, SOURCE)
    for given in (folder, str(folder), "mine", "./mine", Path("mine")):
        assert locate(given) == Located(folder=folder)
    assert locate(GOODFIRE[0]) == Located(registry.entry(*GOODFIRE))
    assert_exact(feature(folder, 3), locate(folder).whole().W_dec.detach()[3])
    put_scope()
    assert_exact(feature(*SCOPE, 3), entry.whole(offline=True).W_dec.detach()[3])
    assert constants.HF_HUB_OFFLINE


def test_what_a_label_says_comes_along(tmp_path):
    put_scope()
    label = Label("llama3.1-8b", "15-llamascope-res-32k", 5, "towers", density=0.25,
                  max_activation=12.0)  # fmt: skip
    got = feature(label, name="eiffel")
    assert got.max_activation == 12.0  # a JumpReLU's dashboards have the row's length in it
    assert got.source["architecture"] == "jumprelu"
    assert got.source["label_max_activation"] == "12.0"
    assert got.source["label_max_activation_is"] == "contribution"
    assert (got.name, got.source["label"], got.source["density"]) == ("eiffel", "towers", "0.25")
    bare = feature(*SCOPE, 5)  # from the cache, which keeps no label
    assert bare == got and bare.max_activation is None and "label" not in bare.source
    assert feature(label).max_activation == got.max_activation


ARCHITECTURES = {
    "standard": {},
    "jumprelu": {},
    "gated": {},
    "topk": {"k": 4},
    "topk rescaled": {"k": 4, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": 4},
}


def on_a_dashboard(folder: Path, x: torch.Tensor, index: int) -> tuple[float, float, float]:
    """By SAELens alone: the maximum as a dashboard shows it, which folds the rows' lengths into the
    encoder wherever SAELens can; as the SAE's own activation; and as a length in the stream.
    """
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder, dtype="float32")
    activation = sae.encode(x)[:, index].max().item()
    one = torch.zeros(2, D_SAE)
    one[1, index] = 1
    off, on = sae.decode(one).detach()
    with suppress(NotImplementedError):  # SAELens refuses it where it would change the activations
        sae.fold_W_dec_norm()
    shown = sae.encode(x)[:, index].max().item()
    return shown, activation, activation * (on - off).norm().item()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_largest_activation_is_in_residual_units(kind, tmp_path, monkeypatch):
    hook = "blocks.13.hook_resid_post"
    folder = saved(tmp_path / "mine", kind.split()[0], hook, rows_of=0.25, **ARCHITECTURES[kind])
    monkeypatch.setattr(registry, "STARTER_DATA", folder)
    shown, activation, length = on_a_dashboard(folder, random(400, D_IN, seed=8) * 3, 5)
    assert activation > 0 and shown > 0
    label = Label("m", "3-s", 5, "x", max_activation=shown, release="starter", sae_id=hook)
    got = feature(label)
    assert got.max_activation == pytest.approx(length, rel=1e-4)
    plain = kind in ("topk", "abstopk")
    assert got.source["label_max_activation_is"] == ("activation" if plain else "contribution")
    clamp = steer("latent_clamp", got, coefficient="1 max", at=13)
    assert clamp.resolve()[0].value == pytest.approx(activation, rel=1e-4)
    assert steer("add", got, coefficient="2 max", at=13).resolve()[0].value == pytest.approx(
        2 * length, rel=1e-4
    )


def test_where_a_norm_cannot_be_folded_is_saelens_own_answer():
    from sae_lens.registry import SAE_CLASS_REGISTRY

    settings = {
        "temporal": {"n_heads": 1, "bottleneck_factor": 2, "kval_topk": 4},
        "matching_pursuit": {"residual_threshold": 0.1},
        "topk": {"k": 4},
        "abstopk": {"k": 4},
    }
    transcoder = {"d_out": D_IN, "apply_b_dec_to_input": False}
    for kind in SAE_CLASS_REGISTRY:
        more = settings.get(kind, transcoder if "transcoder" in kind else {})
        for rescaled in (False, True) if "topk" in kind else (False,):
            own = {**more, "rescale_acts_by_decoder_norm": True} if rescaled else more
            sae = made_sae(kind, **own)
            try:
                sae.fold_W_dec_norm()
                folded = True
            except NotImplementedError:
                folded = False
            assert decoder.folds(kind, rescaled) == folded, kind


def test_without_a_fixed_unit_there_is_no_largest_activation(tmp_path, monkeypatch):
    hook = "blocks.13.hook_resid_post"
    folder = saved(tmp_path / "mine", "standard", hook, normalize_activations="layer_norm")
    monkeypatch.setattr(registry, "STARTER_DATA", folder)
    got = feature(Label("m", "3-s", 5, "x", max_activation=12.0, release="starter", sae_id=hook))
    assert got.max_activation is None
    with pytest.raises(RequestError, match=r"rescales activations \(layer_norm\)"):
        steer("add", got, coefficient="2 max", at=13).resolve()


def as_stored_before(row, number: float, path: Path) -> Path:
    """A file of a feature as earlier versions wrote it: label x norm, whatever the SAE."""
    new = {"architecture", "label_max_activation", "label_max_activation_is"}
    source = {key: value for key, value in row.source.items() if key not in new}
    rescaled = "rescale_acts_by_decoder_norm" in source
    old = number * (1.0 if rescaled else row.norm)
    return replace(row, source=source, max_activation=old).save(path)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_old_files_largest_activation_is_read_by_the_present_rule(kind, tmp_path, monkeypatch):
    hook = "blocks.13.hook_resid_post"
    folder = saved(tmp_path / "mine", kind.split()[0], hook, rows_of=0.25, **ARCHITECTURES[kind])
    monkeypatch.setattr(registry, "STARTER_DATA", folder)
    label = Label("m", "3-s", 5, "x", max_activation=12.0, release="starter", sae_id=hook)
    row = feature(label)
    path = as_stored_before(row, 12.0, tmp_path / "old.safetensors")
    wrong = kind in ("standard", "jumprelu", "gated")
    with pytest.warns(SteerWarning, match="it is read as 12$") if wrong else nullcontext():
        got = load(path)
    assert got == row and got.sha == row.sha
    assert got.max_activation == pytest.approx(row.max_activation)
    assert got.source["architecture"] == kind.split()[0]
    assert got.source["label_max_activation_is"] == row.source["label_max_activation_is"]
    assert ("max_activation_was" in got.source) == wrong
    with warnings.catch_warnings():  # and once it is stored anew there is nothing to tell
        warnings.simplefilter("error")
        assert dict(load(got.save(path)).source) == dict(got.source)


def test_an_old_file_of_an_sae_that_is_not_here(tmp_path):
    """What one layout holds is of one kind; of any other SAE the common kinds are assumed."""
    put_scope()
    row = feature(Label("llama3.1-8b", SOURCE.partition("/")[2], 5, "x", max_activation=12.0))
    path = as_stored_before(row, 12.0, tmp_path / "old.safetensors")
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.warns(SteerWarning, match="it is read as 12$"):
        assert load(path).source["label_max_activation_is"] == "contribution"
    lost = {**row.source, "release": str(tmp_path / "lost"), "sae_id": ""}
    path = as_stored_before(replace(row, source=lost), 12.0, tmp_path / "old.safetensors")
    with pytest.warns(SteerWarning, match="it is read as 12$"):
        assert load(path).source["label_max_activation_is"] == "contribution (assumed)"


def test_a_feature_without_a_label_has_that_of_the_store():
    put_scope()
    plain = feature(*SCOPE, 5)
    clamp = steer("add", plain, coefficient="2 max", at=15)
    get = f"`interp-steer labels sync {SOURCE} --numbers`"
    with pytest.raises(RequestError, match=rf"f15-5@\w+: .* not known here: run {get}"):
        clamp.resolve()
    source = Source.parse(SOURCE)
    where = (source.model, source.name)
    with Store(write=True) as store:
        said = Row(*where, 5, "e", "towers", "gpt", "np", None, 0.25, 12.0)
        store.commit(source, "explanations/a", None, [said, Row(*where, 6, max_activation=3.0)])
    got = feature(f"{SOURCE}/5")
    assert (got.max_activation, got.source["label"]) == (12.0, "towers")
    assert got.source["density"] == "0.25"
    assert feature(*SCOPE, 6).max_activation == 3.0  # a feature that nobody has explained
    assert "label" not in feature(*SCOPE, 6).source
    assert feature(*SCOPE, 7).max_activation is None
    bare = Label(*where, 5, "by a search", release=SCOPE[0], sae_id=SCOPE[1])
    assert feature(bare).max_activation == 12 and feature(bare).source["label"] == "by a search"
    told = Label(*where, 7, "by a search", density=0.5, release=SCOPE[0], sae_id=SCOPE[1])
    assert feature(told).source["density"] == "0.5"  # the label's own, of which the store has none


def test_a_feature_that_never_fired_has_no_multiple():
    put_scope()
    dead = feature(Label("llama3.1-8b", SOURCE.partition("/")[2], 5, "x", max_activation=0.0))
    with pytest.raises(RequestError, match="it never fired where its largest activation"):
        steer("add", dead, coefficient="2 max", at=15).resolve()


def test_the_default_name_can_be_written_in_a_line():
    put_scope()
    assert is_name(feature(*SCOPE, 5).name)
    with pytest.raises(RequestError, match="cannot name a direction"):
        feature(*SCOPE, 5, name="two words")


def test_the_starter_has_an_sae_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "STARTER_DATA", tmp_path / "absent")
    for ask in (lambda: locate("starter"), lambda: feature("starter", 3)):
        with pytest.raises(
            RunError, match=r"^the starter's SAE is not part .* no cfg\.json; [^\n]*"
        ):
            ask()
    hook = "blocks.13.hook_resid_post"
    monkeypatch.setattr(registry, "STARTER_DATA", saved(tmp_path / "data", hook=hook))
    source = registry.entry("starter").neuronpedia  # its width is chosen by training
    got = feature("starter", 3)
    for again in (feature("starter", hook, 3), feature(f"{source}/3")):
        assert again == got and again.source == got.source
    assert (got.name, got.hook_point) == ("f13-3", hook)
    assert got.source["neuronpedia"] == f"{source}/3"
    assert (got.source["release"], got.source["model"]) == ("starter", "starter")
    assert_exact(got, locate("starter").whole().W_dec.detach()[3])
    from interp_steer.labels.sources import resolve

    assert [(s.release, s.sae_id) for s in resolve("starter")] == [("starter", hook)]


def test_the_registry_is_saelens_own():
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    assert registry.releases() == [*directory, "starter"]
    for release, about in directory.items():
        for sae_id, path in about.saes_map.items():
            entry = registry.entry(release, sae_id)
            assert (entry.repo, entry.path, entry.model) == (about.repo_id, path, about.model)
            assert entry.loader == (about.conversion_func or "sae_lens")
            assert entry.neuronpedia == about.neuronpedia_id[sae_id]
            assert entry.norm_scaling_factor == about.norm_scaling_factor.get(sae_id)
            if entry.neuronpedia:
                assert registry.of_source(entry.neuronpedia) == entry


# --- kept rows --------------------------------------------------------------------------------


def test_a_row_is_kept_and_needs_no_file_again(cache):
    file = put_scope()
    got = feature(*SCOPE, 5)
    file.unlink()
    again = feature(*SCOPE, 5, offline=True)
    assert again == got and dict(again.source) == dict(got.source)
    kept = cache / "features" / SCOPE[0] / SCOPE[1] / "5.safetensors"
    kept.write_bytes(b"damaged")
    put_scope()
    assert feature(*SCOPE, 5) == got
    assert kept.stat().st_size > 100


def test_a_kept_row_of_another_scale_is_made_again(monkeypatch):
    put_scope()
    before = feature(*SCOPE, 5)
    path, source, factor = registry._releases()[SCOPE[0]]["saes"][SCOPE[1]]
    saes = registry._releases()[SCOPE[0]]["saes"]
    monkeypatch.setitem(saes, SCOPE[1], [path, source, factor * 2])
    assert feature(*SCOPE, 5).norm == pytest.approx(before.norm / 2)


def test_a_row_kept_by_an_earlier_version_is_read_anew_or_else_used(cache):
    file = put_scope()
    got = feature(*SCOPE, 5)
    kept = cache / "features" / SCOPE[0] / SCOPE[1] / "5.safetensors"
    source = {key: value for key, value in got.source.items() if key != "architecture"}
    old = replace(got, source=source)
    old.save(kept)
    assert feature(*SCOPE, 5).source["architecture"] == "jumprelu"
    old.save(kept)
    file.unlink()
    assert feature(*SCOPE, 5, offline=True) == got


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("llama_scope_lxr_8", "l15r_8x", 1), "not a release .*; nearest: llama_scope_lxr_8x"),
        ((SCOPE[0], "l15r", 1), "llama_scope_lxr_8x' has no SAE 'l15r'; nearest: l15r_8x"),
        ((SCOPE[0], "../../l15r_8x", 1), "has no SAE '../../l15r_8x'"),
        (("../llama_scope_lxr_8x", "l15r_8x", 1), "not a release"),
        ((SCOPE[0], 1), "has 32 SAEs; name one; such as l0r_8x"),
        ((f"{SOURCE}x/1",), "no Neuronpedia source .*; nearest: .*15-llamascope-res-32k"),
        (("https://www.neuronpedia.org/a/../1",), "no Neuronpedia source"),
        (("llama_scope_lxr", 1), "no release .* and no folder; nearest: llama_scope_lxr_8x"),
        ((*SCOPE, D_SAE), rf"feature 16 is out of range: {'/'.join(SCOPE)} has features 0-15$"),
        ((*ANDY, 99), rf"feature 99 is out of range: {'/'.join(ANDY)} has features 0-15$"),
        ((*SCOPE, -1), "-1 is not the index of a feature: expected a whole number from 0"),
        ((*SCOPE, "7"), "'7' is not the index"),
        ((*SCOPE, True), "True is not the index"),
        (SCOPE, "which feature of llama_scope_lxr_8x, l15r_8x"),
        ((SOURCE,), "which feature of llama3.1-8b"),
        (("/nowhere/at/all", 1), "no folder /nowhere/at/all"),
        ((Path("/"), 1), r"/ has no cfg.json; expected a folder that SAELens saved"),
        ((Path("/"), "l15r_8x", 1), "/ is a folder: it has no SAE"),
        ((Label("a", "b", 1, "c"), 1), "the label names both"),
        ((Label("a", "b", 1, "c"),), "'a/b' is no Neuronpedia source"),
    ],
)
def test_wrong_requests_are_one_line(given, said):
    put_scope()
    put_andy()
    with pytest.raises(RequestError, match=said) as error:
        feature(*given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "hook", "more", "said"),
    [
        ("standard", "blocks.5.attn.hook_z", {"reshape_activations": "hook_z"}, "hook_z"),
        ("standard", "blocks.5.ln2.hook_normalized", {}, "ln2.hook_normalized"),
        ("standard", "blocks.5.hook_resid_mid", {}, "hook_resid_mid"),
        ("standard", "", {}, "an unnamed place"),
        ("transcoder", "blocks.5.hook_mlp_in", {"d_out": D_IN}, "transcoder"),
        ("standard", "blocks.5.hook_resid_post", {"normalize_activations": "covariance_whitening"},
         "whitened activations"),
    ],
)  # fmt: skip
def test_places_that_cannot_be_steered_are_refused(kind, hook, more, said, tmp_path):
    folder = saved(tmp_path / "mine", kind, hook, **more)
    with pytest.raises(RequestError, match=said) as error:
        feature(folder, 1)
    assert "\n" not in str(error.value)
    if said.startswith("hook"):
        assert "what can: resid_pre, resid_post, attn_out, mlp_out, z" in str(error.value)


def test_one_heads_sae_and_a_transcoder_find_their_place(tmp_path):
    z = saved(tmp_path / "z", "standard", "blocks.5.attn.hook_z", metadata={"hook_head_index": 3})
    assert feature(z, 1).hook_point == "blocks.5.attn.hook_z.3"
    across = saved(tmp_path / "across", "transcoder", "blocks.5.ln2.hook_normalized",
                   d_out=D_IN, metadata={"hook_name_out": "blocks.5.hook_mlp_out"})  # fmt: skip
    assert feature(across, 1).hook_point == "blocks.5.hook_mlp_out"


def test_llama_scope_transcoders_are_refused():
    put_scope(hook_point_out="blocks.15.hook_mlp_out")
    with pytest.raises(RequestError, match="a transcoder from"):
        feature(*SCOPE, 1)


def test_a_finetuning_scale_is_refused_as_saelens_does():
    put_old()
    from safetensors.torch import load_file

    state = load_file(stored(OLD, "sae_weights.safetensors"))
    save_file(
        {**state, "scaling_factor": torch.full((D_SAE,), 2.0)},
        stored(OLD, "sae_weights.safetensors"),
    )
    with pytest.raises(RequestError, match="finetuning scaling factor"):
        feature(*OLD, 1)


@pytest.mark.parametrize("names", [SCOPE, ANDY, GOODFIRE, TEMPORAL, OLD])
def test_offline_without_the_files_says_what_to_do(names, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # offline= alone must do
    repo = re.escape(registry.entry(*names).repo)
    with pytest.raises(RunError, match=rf"offline, and {repo}/.* `hf download {repo} .*`$"):
        feature(*names, 1, offline=True)


@pytest.mark.parametrize(
    ("names", "put"),
    [
        (SCOPE, lambda patch: put_scope()),
        (ANDY, lambda patch: put_andy()),
        (ANDY, lambda patch: put_andy(old=True)),
        (GOODFIRE, put_goodfire),
        (TEMPORAL, lambda patch: put_temporal()),
        (OLD, lambda patch: put_old()),
    ],
)
@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_damaged_files_are_one_line(names, put, damage, monkeypatch):
    file = put(monkeypatch)
    data = file.read_bytes()
    left = {"cut": data[: len(data) // 4], "noise": b"\xff" * 999, "empty": b""}[damage]
    file.write_bytes(left)
    with pytest.raises(RunError, match="is damaged") as error:
        feature(*names, D_SAE - 1)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def header(**tensors) -> bytes:
    data = json.dumps(tensors).encode()
    return struct.pack("<Q", len(data)) + data


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (struct.pack("<Q", 1 << 60) + b"{}", "its header is said to be 1152921504606846976"),
        (struct.pack("<Q", 1 << 20) + b"{}", "its header is said to be 1048576"),
        (struct.pack("<Q", 4) + b"null", "not JSON"),
        (struct.pack("<Q", 4) + b"nope", "not JSON"),
        (header(), "it has no W_dec"),
        (header(W_dec={"dtype": "F32"}), "nothing sensible of W_dec"),
        (header(W_dec={"dtype": "I8", "shape": [2, 2], "data_offsets": [0, 4]}), "nothing sens"),
        (header(W_dec={"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 4]}), "contradicts"),
        (header(W_dec={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}) + b"0" * 16,
         "expected a matrix"),
        (header(W_dec={"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}), "contradict"),
        (header(W_dec={"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 324]}), "speaks of"),
    ],
)  # fmt: skip
def test_headers_are_not_believed(content, said, tmp_path):
    folder = saved(tmp_path / "mine")
    (folder / "sae_weights.safetensors").write_bytes(content)
    with pytest.raises(RunError, match=rf"is damaged .*{said}") as error:
        feature(folder, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "put", "file"),
    [
        (SCOPE, put_scope, "hyperparams.json"),
        (ANDY, put_andy, "config.json"),
        (TEMPORAL, put_temporal, "conf.yaml"),
        (OLD, put_old, "cfg.json"),
    ],
)
@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_damaged_settings_are_one_line(names, put, file, text):
    put()
    stored(names, file).write_text(text)
    with pytest.raises(RunError, match="is damaged") as error:
        feature(*names, 1)
    assert "\n" not in str(error.value)


# --- over HTTP --------------------------------------------------------------------------------


class Hub:
    """The hub on loopback: serves the files of a folder, and may misbehave."""

    def __init__(self, root: Path) -> None:
        self.root, self.mode, self.sent, self.elsewhere = root, "", 0, ""
        self.log: list[tuple[str, str | None, str | None]] = []  # path, Range, Authorization
        world = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                asked = self.headers.get("Range")
                world.log.append((self.path, asked, self.headers.get("Authorization")))
                path = world.root / self.path.split("/resolve/main/")[-1].lstrip("/")
                if world.mode == "busy":
                    world.mode = ""
                    return self.head(503)
                if world.mode in ("401", "404", "500"):
                    return self.head(int(world.mode))
                if not path.is_file():
                    return self.head(404)
                if world.elsewhere and path.suffix == ".safetensors":
                    return self.head(302, Location=f"{world.elsewhere}/{path.name}")
                size = path.stat().st_size
                first, last = 0, size - 1
                if asked and world.mode != "ignores":
                    ends = asked.removeprefix("bytes=").split("-")
                    first, last = int(ends[0]), min(int(ends[1] or last), last)
                    told = f"bytes {first}-{last}/{size}"
                    if world.mode == "other part":
                        told = f"bytes {first + 1}-{last + 1}/{size}"
                    self.head(206, last - first + 1, {"Content-Range": told})
                else:
                    self.head(200, size)
                if body:
                    self.body(path, first, last - first + 1)

            def head(self, status, length=0, more=None, **headers) -> None:
                self.send_response(status)
                etag = f'"{hashlib.sha256(self.path.encode()).hexdigest()}"'  # one for each file
                common = {"ETag": etag, "X-Repo-Commit": COMMIT, "Content-Length": str(length)}
                if status == 404:
                    common["X-Error-Code"] = "EntryNotFound"
                for name, value in {**common, **(more or {}), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()

            def body(self, path: Path, first: int, count: int) -> None:
                cut = count // 2 if world.mode == "cuts" and path.suffix != ".json" else count
                with path.open("rb") as file:
                    file.seek(first)
                    while cut > 0:
                        data = file.read(min(cut, 1 << 16))
                        try:
                            self.wfile.write(data)
                        except OSError:  # the client has had enough
                            self.close_connection = True
                            return
                        world.sent += len(data)
                        cut -= len(data)
                if world.mode == "cuts":
                    self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT does as huggingface_hub is imported."""
    pattern = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + pattern)


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    world = Hub(tmp_path / "served")
    endpoint(monkeypatch, world.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    yield world
    world.close()


def big(folder: Path, rows: int, columns: int, key: str = "W_dec", name: str = "F32") -> int:
    """A safetensors file of zeros that takes no disk; where its matrix starts."""
    size = rows * columns * (4 if name == "F32" else 2)
    about = {key: {"dtype": name, "shape": [rows, columns], "data_offsets": [0, size]}}
    head = header(**about)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    return len(head)


def served(world: Hub, rows: int = 16384, columns: int = 768) -> torch.Tensor:
    """A 50 MB SAE on the hub; its row 9999."""
    entry = registry.entry(*OLD)
    home = world.root / entry.path
    home.mkdir(parents=True, exist_ok=True)
    (home / "cfg.json").write_text(json.dumps({"hook_point": "blocks.8.hook_resid_pre"}))
    start = big(home / "sae_weights.safetensors", rows, columns)
    row = random(columns, seed=7)
    with (home / "sae_weights.safetensors").open("r+b") as file:
        file.seek(start + 9999 * columns * 4)
        file.write(row.numpy().tobytes())
    return row


def test_a_row_on_the_hub_costs_a_few_kilobytes(online):
    want = served(online)
    got = feature(*OLD, 9999)
    assert_exact(got, want)
    assert online.sent < 20_000, online.sent
    assert got.source["revision"] == COMMIT
    asked = len(online.log)
    assert feature(*OLD, 9999) == got and len(online.log) == asked
    online.mode = "404"
    with pytest.raises(RunError, match=r"cannot read a part of .*: there is no such file"):
        feature(*OLD, 9998)


def test_a_small_file_and_a_long_header_come_whole(online):
    served(online, rows=10_000, columns=4)
    assert feature(*OLD, 9999).norm > 0
    home = online.root / registry.entry(*OLD).path
    many = {f"b{i:04}": torch.zeros(1) for i in range(500)}
    save_file({**many, "W_dec": random(3, 4)}, home / "sae_weights.safetensors")
    assert_exact(feature(*OLD, 1), random(3, 4)[1])


def test_a_passing_fault_is_tried_again(online):
    want = served(online)
    feature(*OLD, 9999)
    (Path(constants.HF_HUB_CACHE).parent / "cache").rename(online.root / "away")
    online.mode = "busy"
    assert_exact(feature(*OLD, 9999), want)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("ignores", "the server ignores Range and sends the whole file"),
        ("cuts", r"\(3 tries\)"),
        ("500", r"status 500 \(3 tries\)"),
        ("other part", "another part than was asked for"),
        ("401", "no permission; accept its terms on the hub and set HF_TOKEN"),
        ("404", "there is no such file"),
    ],
)
def test_servers_that_misbehave_are_one_line(mode, said, online):
    served(online)
    hub.Repo(registry.entry(*OLD).repo).path(f"{registry.entry(*OLD).path}/cfg.json")
    online.mode, online.sent = mode, 0
    with pytest.raises(RunError, match=rf"^cannot read a part of jbloom/.*: .*{said}") as error:
        feature(*OLD, 9999)
    assert "\n" not in str(error.value) and "hf_secret" not in str(error.value)
    assert online.sent < 8_000_000  # what the socket had taken before it was closed


def test_no_server_is_one_line(online, monkeypatch):
    served(online)
    hub.Repo(registry.entry(*OLD).repo).path(f"{registry.entry(*OLD).path}/cfg.json")
    endpoint(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(RunError, match=r"the connection broke off \(3 tries\)"):
        feature(*OLD, 9999)


def test_the_token_stays_with_the_hub(online):
    want = served(online)
    other = Hub(online.root / registry.entry(*OLD).path)
    online.elsewhere = other.url
    try:
        assert_exact(feature(*OLD, 9999), want)
        assert {seen for path, _, seen in online.log if path.endswith(".safetensors")} == {
            "Bearer hf_secret"
        }
        assert other.log and all(seen is None for _, _, seen in other.log)
        assert all(asked for _, asked, _ in other.log)
        assert other.sent < 20_000
    finally:
        other.close()


def test_a_column_layout_is_downloaded_whole_and_kept(online):
    file = put_scope()
    home = online.root / registry.entry(*SCOPE).path
    home.parent.mkdir(parents=True, exist_ok=True)
    file.parents[1].rename(home)  # off this machine, onto the hub
    got = feature(*SCOPE, 5)
    asked = len(online.log)
    assert asked and feature(*SCOPE, 6, offline=True) != got
    assert len(online.log) == asked
    assert got.source["revision"] == COMMIT
    online.mode = "404"
    with pytest.raises(RunError, match=r"cannot fetch .*: there is no such file"):
        feature(*ANDY, 1)


# --- cost -------------------------------------------------------------------------------------


def test_a_row_of_500_mb_takes_little_memory(tmp_path):
    row_file, column_file = tmp_path / "row.safetensors", tmp_path / "column.safetensors"
    start = big(row_file, 32768, 4096)
    with row_file.open("r+b") as file:
        file.seek(start + 30_000 * 4096 * 4)
        file.write(struct.pack("<f", 2.5))
    start = big(column_file, 4096, 65536, "decoder.weight", "BF16")
    with column_file.open("r+b") as file:
        file.seek(start + (4095 * 65536 + 30_000) * 2)
        file.write(b"\x20\x40")  # 2.5
    code = f"""
        import sys
        from pathlib import Path
        from interp_steer.features.decoder import Safetensors
        from interp_steer.features.hub import LocalFile
        def memory(entry):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 1024
        for name, key, kind, at in (
            ({str(row_file)!r}, "W_dec", "row", 0),
            ({str(column_file)!r}, "decoder.weight", "column", 4095),
        ):
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            before = memory("VmRSS")
            got = getattr(Safetensors(LocalFile(Path(name))), kind)(key, 30_000)
            assert got[at] == 2.5 and len(got) == 4096
            print(memory("VmHWM") - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    grown = [float(line) for line in done.stdout.split()]
    assert len(grown) == 2 and max(grown) < 64, grown


def test_reading_a_row_loads_no_model_library(tmp_path):
    folder = saved(tmp_path / "mine")
    heavy = "{'sae_lens', 'transformer_lens', 'transformers', 'datasets', 'pandas', 'matplotlib'}"
    for code in (
        f"from interp_steer import feature; feature({str(folder)!r}, 3)\n"
        f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)",
        "from interp_steer.labels import registry; registry.entry('starter')\n"
        "assert not {'torch', 'numpy', 'requests', 'huggingface_hub'} & set(sys.modules)",
    ):
        subprocess.run([sys.executable, "-c", f"import sys\n{code}"], check=True)


def test_units_of_every_layout_are_read_here():
    assert set(decoder.LAYOUTS) >= {"sae_lens", "llama_scope", "dictionary_learning_1"}
    loaders = {registry.entry(*names).loader for names in (SCOPE, ANDY, GOODFIRE, TEMPORAL, OLD)}
    assert loaders == set(decoder.LAYOUTS)
