import json
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from interp_steer.errors import RequestError, RunError, SteerWarning
from interp_steer.features import decoder
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

pytestmark = pytest.mark.usefixtures("cache")


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
    from interp_steer.labels.naming import resolve

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


# --- over HTTP --------------------------------------------------------------------------------


# --- cost -------------------------------------------------------------------------------------


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
