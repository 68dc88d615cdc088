"""Whole SAEs against SAELens's own objects; the latent clamp against plain Hugging Face hooks."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_lens import (
    SAE,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)

from interp_steer import Engine, RequestError, Row, Sampling, chat, parse, steer
from interp_steer.engine.hooks import run_with_cache
from interp_steer.features.feature import feature, locate
from interp_steer.features.sae import Sae, SaeStore
from interp_steer.model.site import Site
from interp_steer.steering.intervention import line

LAYER, WIDTH, LATENTS = 3, 64, 256
KINDS = {
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "gated": (GatedSAE, GatedSAEConfig, {}),
    "topk": (TopKSAE, TopKSAEConfig, {"k": 16, "rescale_acts_by_decoder_norm": True}),
}


def saved(folder: Path, kind: str, seed: int = 0, hook: str | None = None, **changes) -> Path:
    """A random SAE of one architecture, saved by SAELens."""
    sae_class, config, extra = KINDS[kind]
    torch.manual_seed(seed)
    sae = sae_class(config(d_in=WIDTH, d_sae=LATENTS, **extra, **changes))
    with torch.no_grad():
        for name, weight in sae.named_parameters():
            weight.copy_(torch.randn_like(weight) * (0.3 if weight.ndim == 2 else 0.1))
            if name == "threshold":
                weight.copy_(torch.rand_like(weight))
    sae.cfg.metadata.hook_name = hook or f"blocks.{LAYER}.hook_resid_post"
    sae.cfg.metadata.model_name = "tiny"
    sae.save_model(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def topk(tmp_path: Path) -> Path:
    return saved(tmp_path / "topk", "topk")


def test_it_encodes_and_decodes_as_saelens_does(folder: Path):
    from sae_lens import SAE

    theirs, mine = SAE.load_from_disk(folder), Sae.load(folder)
    x = torch.randn(3, 5, WIDTH) * 3
    latents = theirs.encode(x)
    assert (mine.site, mine.d_sae, mine.d_model) == (Site("resid_post", LAYER), LATENTS, WIDTH)
    assert torch.equal(mine.encode(x), latents)
    assert torch.equal(mine.decode(latents), theirs.decode(latents))
    split, error = mine.split(x)
    torch.testing.assert_close(theirs.decode(split) + error, x)
    assert 0 < (latents > 0).float().mean() < 1  # else the next tests say nothing


def test_some_latents_are_those_of_all_latents(folder: Path):
    sae = Sae.load(folder)
    x = torch.randn(4, 6, WIDTH) * 3
    index = torch.randint(LATENTS, (4, 3))
    every = sae.encode(x)
    expected = torch.stack([every[row][:, index[row]] for row in range(4)])
    assert expected.any()
    torch.testing.assert_close(sae.latents(x, index), expected, atol=1e-5, rtol=1e-5)


def test_few_latents_at_once_change_nothing(topk: Path, monkeypatch):
    sae = Sae.load(topk)
    x, index = torch.randn(5, 6, WIDTH), torch.randint(LATENTS, (5, 2))
    whole = sae.latents(x, index)
    assert whole.any()
    monkeypatch.setattr("interp_steer.features.sae.LARGEST", LATENTS * 12)  # two rows at a time
    torch.testing.assert_close(sae.latents(x, index), whole)


def test_a_row_is_what_one_unit_of_a_latent_adds(folder: Path):
    """Against the difference of two reconstructions, whatever the decoder does inside."""
    sae = Sae.load(folder)
    for i in (0, 17, LATENTS - 1):
        one = torch.zeros(LATENTS)
        one[i] = 1
        adds = sae.decode(one) - sae.decode(torch.zeros(LATENTS))
        torch.testing.assert_close(sae.rows(torch.tensor(i)), adds, atol=1e-6, rtol=1e-5)


# --- the latent clamp ---------------------------------------------------------------------------


def clamped_by_hand(model, folder: Path, ids, targets: dict[int, float], first: int = 1):
    """resid_post of the SAE's block, clamped by a plain Hugging Face hook with SAELens's encoder
    and decoder; and the logits after it.
    """
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    seen = {}

    def hook(_module, _args, out):
        x = out[0] if isinstance(out, tuple) else out
        latents = sae.encode(x)
        # the change in the reconstruction when latents i take the values c_i
        wanted = latents.clone()
        for i, c in targets.items():
            wanted[..., i] = c
        moved = x + sae.decode(wanted) - sae.decode(latents)
        moved = torch.cat([x[:, :first], moved[:, first:]], dim=1)
        seen["before"], seen["after"] = x[0], moved[0]
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    handle = model.hf.model.layers[LAYER].register_forward_hook(hook)
    with torch.no_grad():
        logits = model.hf(torch.tensor([ids])).logits[0]
    handle.remove()
    return seen["before"], seen["after"], logits


def close(one, other, streams):
    bound = 1e-5 * streams.norm(dim=-1).clamp_min(1)
    return bool(((one - other).abs().amax(-1) <= bound).all())


@pytest.mark.parametrize("targets", [{5: 4.0}, {5: 4.0, 77: 0.0, 200: 2.5}])
def test_latent_clamp_is_the_formula_through_cached_generation(tiny, folder, targets):
    prompts = [
        chat("Name three fruits."),
        chat("What is the tallest mountain, and who climbed it?"),
    ]
    setting = tuple(
        steer("latent_clamp", feature(folder, i), coefficient=c, at=LAYER)
        for i, c in targets.items()
    )
    rows = [Row(p, s, Sampling(max_new_tokens=12)) for p in prompts for s in ((), setting)]
    site = Site("resid_post", LAYER)
    results = Engine(tiny).generate(rows, taps=[site])
    for result in results[1::2]:
        ids = (*tiny.encode(result.row.prompt).ids, *result.token_ids)
        read = len(result.taps[site])  # the last token may never have been read
        before, after, logits = clamped_by_hand(tiny, folder, ids[:read], targets)
        assert close(result.taps[site], after, before)
        assert not close(result.taps[site], before, before)  # it did something
        n = len(tiny.encode(result.row.prompt).ids)
        assert len(result.token_ids) > 3 and read >= n + len(result.token_ids) - 1
        greedy = logits[n - 1 :].argmax(-1).tolist()[: len(result.token_ids)]
        assert greedy == list(result.token_ids)


def test_rows_of_one_batch_clamp_their_own_latents(tiny, tmp_path):
    """Two SAEs, different latents, scopes and numbers of latents, beside unsteered rows."""
    one, two = saved(tmp_path / "one", "topk"), saved(tmp_path / "two", "jumprelu", seed=1)
    prompt = chat("I love the tower; I hate the rain.")
    n = len(tiny.encode(prompt).ids)
    clamp = "latent_clamp"
    settings = [
        (),
        (steer(clamp, feature(one, 3), coefficient=5, at=LAYER),),
        (steer(clamp, feature(two, 3), coefficient=5, at=LAYER, on="last"),),
        tuple(steer(clamp, feature(one, i), coefficient=i, at=LAYER) for i in (8, 9, 10)),
        (steer("add", feature(one, 3), coefficient=2, at=LAYER),),
    ]
    site = Site("resid_post", LAYER)
    engine = Engine(tiny)
    together = engine.score([Row(prompt, s) for s in settings], [()] * 5, taps=[site])
    ids = tiny.encode(prompt).ids
    by_hand = [
        clamped_by_hand(tiny, one, ids, {3: 5.0}),
        clamped_by_hand(tiny, two, ids, {3: 5.0}, first=n - 1),
        clamped_by_hand(tiny, one, ids, {8: 8.0, 9: 9.0, 10: 10.0}),
    ]
    for score, (before, after, _) in zip(together[1:4], by_hand, strict=True):
        assert close(score.taps[site], after, before)
    for row, score in zip(settings, together, strict=True):
        alone = engine.score([Row(prompt, row)], [()], taps=[site])[0]
        torch.testing.assert_close(score.taps[site], alone.taps[site])


def test_it_is_not_the_projection_clamp(tiny, topk):
    prompt, row = chat("Name three fruits."), feature(topk, 5)
    site = Site("resid_post", LAYER)
    settings = [
        (steer(op, row, coefficient=4 * (row.norm if op == "clamp" else 1), at=LAYER),)
        for op in ("latent_clamp", "clamp")
    ]
    latent, projection = (
        s.taps[site]
        for s in Engine(tiny).score([Row(prompt, s) for s in settings], [(), ()], taps=[site])
    )
    apart = (latent - projection).norm(dim=-1)[1:]
    assert (apart > 0.1 * latent.norm(dim=-1)[1:]).any()


def test_transformer_lens_sees_the_same_clamp(tiny, folder):
    prompt = chat("Name three fruits.")
    setting = (steer("latent_clamp", feature(folder, 5), coefficient=4, at=LAYER),)
    _, cache = run_with_cache(tiny, prompt, setting)
    before, after, _ = clamped_by_hand(tiny, folder, tiny.encode(prompt).ids, {5: 4.0})
    assert close(cache[f"blocks.{LAYER}.hook_resid_post"][0], after, before)


def test_bfloat16_streams_stay_bfloat16(tiny_folder, topk):
    from interp_steer import SteeringModel

    model = SteeringModel.load(str(tiny_folder), dtype="bfloat16")
    setting = (steer("latent_clamp", feature(topk, 5), coefficient=40, at=LAYER),)
    site = Site("resid_post", LAYER)
    prompt = chat("Name three fruits.")
    plain, steered = Engine(model).score([Row(prompt), Row(prompt, setting)], [(), ()], taps=[site])
    assert steered.taps[site].dtype == torch.bfloat16
    sae = Sae.load(topk)
    x = plain.taps[site].float()
    step = (40 - sae.encode(x)[:, 5:6]) * sae.rows(torch.tensor([5]))
    apart = (steered.taps[site].float() - (x + step))[1:].norm(dim=-1)
    assert (apart <= 2**-7 * (x + step)[1:].norm(dim=-1)).all()


def test_the_line_reads_back_and_max_is_in_activation_units(folder):
    row = feature(folder, 5)
    # the TopK SAE's activations are lengths already: it divides by the row's norm as it decodes
    unit = 1.0 if "topk" in folder.name else row.norm
    assert abs(row.norm - 1) > 0.1
    known = replace(row, max_activation=6.0 * unit)
    (one,) = parse(f"latent_clamp({row.label}, 2 max) at {LAYER}", {row.name: known})
    (resolved,) = one.resolve()
    assert resolved.value == pytest.approx(12.0)
    assert parse(line([resolved]), {row.name: known}) == (resolved,)
    (strength,) = resolved.strengths()
    assert strength["max"] == pytest.approx(2.0) and strength["dose"] is None


def test_what_cannot_be_clamped_is_refused_with_the_reason(tiny, topk, tmp_path):
    row = feature(topk, 5)
    plain = replace(row, name="plain", source={})
    with pytest.raises(RequestError, match="needs a feature of an SAE, and plain@"):
        steer("latent_clamp", plain, coefficient=1, at=LAYER)
    with pytest.raises(RequestError, match="works there, not at resid_post 4"):
        steer("latent_clamp", row, coefficient=1, at=4)
    with pytest.raises(RequestError, match="unit none or max"):
        steer("latent_clamp", row, coefficient="0.5 dose", at=LAYER)
    engine, prompt = Engine(tiny), chat("Name three fruits.")

    def run(*clamps):
        return engine.score([Row(prompt, clamps)], [()])

    clamp = steer("latent_clamp", row, coefficient=1, at=LAYER)
    other = feature(saved(tmp_path / "other", "topk", seed=9), 6)
    with pytest.raises(RequestError, match="latents of different SAEs at resid_post 3"):
        run(clamp, steer("latent_clamp", other, coefficient=1, at=LAYER))
    with pytest.raises(RequestError, match="one latent twice"):
        run(clamp, clamp)
    late = steer("latent_clamp", feature(topk, 6), coefficient=1, at=LAYER, on="last")
    with pytest.raises(RequestError, match="different scopes"):
        run(clamp, late)
    scaled = saved(tmp_path / "scaled", "standard", normalize_activations="layer_norm")
    with pytest.raises(RequestError, match=r"rescales every activation \(layer_norm\)"):
        run(steer("latent_clamp", feature(scaled, 5), coefficient=1, at=LAYER))


def test_an_encoder_across_positions_is_refused(tmp_path):
    from sae_lens import TemporalSAE, TemporalSAEConfig

    torch.manual_seed(0)
    sae = TemporalSAE(
        TemporalSAEConfig(d_in=WIDTH, d_sae=LATENTS, n_heads=2, bottleneck_factor=4, kval_topk=8)
    )
    sae.cfg.metadata.hook_name = f"blocks.{LAYER}.hook_resid_post"
    sae.save_model(tmp_path / "temporal")
    with pytest.raises(RequestError, match="looks across positions"):
        Sae.load(tmp_path / "temporal").check_clampable()


def test_changed_files_are_noticed(tiny, topk):
    row = feature(topk, 5)
    saved(topk, "topk", seed=4)
    clamp = steer("latent_clamp", row, coefficient=1, at=LAYER)
    with pytest.raises(RequestError, match=r"is not the decoder row of .* any more"):
        Engine(tiny, SaeStore().encoder).score([Row(chat("Name three fruits."), (clamp,))], [()])


def test_an_sae_that_does_not_fit_is_refused(tiny, starter, topk, tmp_path):
    with pytest.raises(RequestError, match="encodes streams 64 wide; starter is 576 wide"):
        Sae.load(topk).check(starter)
    far = saved(tmp_path / "far", "standard", hook="blocks.9.hook_resid_post")
    with pytest.raises(RequestError, match="layer 9 is out of range"):
        Sae.load(far).check(tiny)
    with pytest.raises(RequestError, match=r"feature 256 is out of range: .* has features 0-255"):
        Sae.load(topk).index(256)


# --- the store --------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """Folders that SAELens reads an SAE from, from here on."""
    seen, real = [], SAE.load_from_disk.__func__

    def counted(cls, folder, *rest, **more):
        seen.append(str(folder))
        return real(cls, folder, *rest, **more)

    monkeypatch.setattr(SAE, "load_from_disk", classmethod(counted))
    return seen


@pytest.fixture
def three(tmp_path):
    return [saved(tmp_path / f"sae{n}", "topk", seed=n) for n in range(3)]


def test_three_saes_and_six_rows_are_three_loads(tiny, three, loads):
    rows = [
        Row(chat("Name three fruits."), (steer("latent_clamp", one, coefficient=2, at=LAYER),))
        for one in (feature(folder, index) for folder in three for index in (5, 6))
    ]
    loads.clear()
    engine = Engine(tiny, SaeStore(budget=0).encoder)  # nothing is kept that nobody holds
    together = engine.score(rows, [(5,)] * 6)
    assert sorted(loads) == sorted(map(str, three))
    engine.generate(rows)
    assert len(loads) <= 6
    for row, score in zip(rows, together, strict=True):
        assert torch.allclose(
            Engine(tiny).score([row], [(5,)])[0].logprobs, score.logprobs, atol=1e-4
        )


def test_the_latest_saes_are_kept_within_a_budget(three, loads):
    places = [locate(folder) for folder in three]
    cpu = torch.device("cpu")
    store = SaeStore(budget=10**9)
    one = store.load(places[0], cpu)
    size = store.bytes("cpu")
    assert size == sum(p.numel() for p in one.inner.parameters()) * 4
    del one
    store = SaeStore(budget=2 * size)
    for n in (0, 1, 0, 2, 0):  # 2 takes the place of 1, which was asked for before 0
        store.load(places[n], cpu)
        assert store.bytes("cpu") <= 2 * size
    assert loads[1:] == [str(three[n]) for n in (0, 1, 2)]
    held = store.load(places[1], cpu)
    for n in (0, 2):
        store.load(places[n], cpu)
    assert store.load(places[1], cpu) is held


def test_two_threads_load_an_sae_once(three, loads):
    store, place = SaeStore(), locate(three[0])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: store.load(place, torch.device("cpu")), range(8)))
    assert len(loads) == 1 and all(one is found[0] for one in found)
