import warnings

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from interp_steer.errors import RequestError, SteerWarning
from interp_steer.prompts.prompt import chat
from interp_steer.steering.contrast import (
    METHODS,
    Contrast,
    act_add,
    logistic_probe,
    mean_difference,
    principal_component,
)
from tests.conftest import hf_streams

HAPPY = ["I love the tower.", "Yes, happy and lazy fox", "What is happy? Name three", "I am happy"]
SAD = ["I hate the rain.", "no, sad and lazy dog", "What is sad? Name three fruits", "maybe sad"]


def streams(model, ids: tuple[int, ...]) -> np.ndarray:
    """resid_post [layer, pos, d_model] of one prompt on its own, from Hugging Face."""
    return torch.cat(hf_streams(model, ids)[1:]).numpy()


def close(got: torch.Tensor, want: np.ndarray) -> bool:
    errors = np.linalg.norm(got.numpy() - want, axis=-1)
    return bool((errors <= 1e-5 * np.maximum(1, np.linalg.norm(want, axis=-1))).all())


def rng_rows(seed: int, n: int, width: int = 12) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=(n, width)), dtype=torch.float32)


def cosine(a: torch.Tensor, b) -> float:
    a, b = a.double().numpy(), np.asarray(b, dtype=np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# --- measuring --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [3, 16])
@pytest.mark.parametrize("position", ["mean", "last"])
def test_activations_are_hugging_faces(tiny, position, batch):
    found = Contrast.measure(tiny, HAPPY, SAD[:3], position, batch)
    for rows, texts in ((found.positive, HAPPY), (found.negative, SAD[:3])):
        assert rows.shape == (tiny.n_layers, len(texts), tiny.d_model)
        assert rows.dtype == torch.float32
        for i, text in enumerate(texts):
            x = streams(tiny, tiny.encode(text).ids)
            want = x[:, -1] if position == "last" else x[:, 1:].mean(1)
            assert close(rows[:, i], want)


def test_mean_is_over_the_answer_where_there_is_one(tiny):
    prompt = chat("Who climbed it?", "You are a fox", "the lazy dog")
    ids = tiny.encode(prompt).ids
    tokens = [tiny.tokenizer.decode([i]) for i in ids]
    begin = next(i for i in range(len(ids)) if "".join(tokens[i:]) == "the lazy dog")
    assert 0 < begin < len(ids) - 2
    open_chat = chat("Who climbed it?", "You are a fox")
    found = Contrast.measure(tiny, [prompt], [open_chat])
    assert close(found.positive[:, 0], streams(tiny, ids)[:, begin:].mean(1))
    other = streams(tiny, tiny.encode(open_chat).ids)
    assert close(found.negative[:, 0], other[:, 1:].mean(1))


def test_last_is_the_last_token_of_an_answer_or_of_the_opened_turn(tiny):
    answered, opened = chat("Who?", answer="Yes, no"), chat("Who?")
    ends = [tiny.tokenizer.decode(tiny.encode(one).ids)[-4:] for one in (answered, opened)]
    assert ends == [", no", "ant\n"]
    found = Contrast.measure(tiny, [answered], [opened], "last")
    assert close(found.positive[:, 0], streams(tiny, tiny.encode(answered).ids)[:, -1])
    assert close(found.negative[:, 0], streams(tiny, tiny.encode(opened).ids)[:, -1])


def test_answer_is_where_the_two_prompts_of_a_pair_first_differ(tiny):
    positive = [chat("Name the tower", answer="(A) yes"), "I love the rain and more"]
    negative = [chat("Name the tower", answer="(B) no, never"), "I love the dog"]
    found = Contrast.measure(tiny, positive, negative, "answer", batch=1)
    letters = []
    for i in range(2):
        pair = [tiny.encode(positive[i]).ids, tiny.encode(negative[i]).ids]
        at = 0
        while pair[0][at] == pair[1][at]:
            at += 1
        letters.append([tiny.tokenizer.decode([ids[at]]) for ids in pair])
        assert close(found.positive[:, i], streams(tiny, pair[0])[:, at])
        assert close(found.negative[:, i], streams(tiny, pair[1])[:, at])
    assert letters == [["A", "B"], [" rain", " dog"]]


def test_the_source_says_how_it_was_measured(tiny):
    found = Contrast.measure(tiny, HAPPY, SAD[:3], "last")
    assert found.source["position"] == "last"
    assert found.source["prompts"] == "4 positive, 3 negative"
    assert found.source["model"] == tiny.name
    assert found.source["fingerprint"] == tiny.fingerprint


@pytest.mark.parametrize(
    ("positive", "negative", "position", "said"),
    [
        (HAPPY, SAD, "lst", r"unknown position 'lst'; nearest: last"),
        ([], SAD, "mean", "needs positive and negative prompts"),
        (HAPPY, [], "answer", "needs positive and negative prompts"),
        (HAPPY, SAD[:2], "answer", "in pairs, got 4 positive and 2 negative"),
        (["I love"], ["I love"], "answer", "pair 1 does not share its beginning"),
        (["I love the", "I love"], ["I love it", "I love the"], "answer", "pair 2 does not share"),
        (HAPPY, [""], "mean", "the prompt is empty"),
    ],
)
def test_prompts_that_cannot_be_contrasted_are_refused(tiny, positive, negative, position, said):
    with pytest.raises(RequestError, match=said):
        Contrast.measure(tiny, positive, negative, position)


def test_prompts_of_one_token_are_refused(tiny, monkeypatch):
    one = type(tiny.encode("I love"))((5,), (True,))
    monkeypatch.setattr(tiny, "encode", lambda prompt: one)
    for position in ("mean", "last"):
        with pytest.raises(RequestError, match="one token long"):
            Contrast.measure(tiny, ["a"], ["b"], position)


# --- methods ----------------------------------------------------------------------------------


def test_mean_difference_is_numpys():
    positive, negative = rng_rows(1, 7) + 3, rng_rows(2, 5)
    want = np.mean(positive.numpy(), axis=0) - np.mean(negative.numpy(), axis=0)
    assert np.allclose(mean_difference(positive, negative).numpy(), want, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_principal_component_is_sklearns_of_the_centred_differences(seed):
    rng = np.random.default_rng(seed)
    planted = rng.normal(size=12)
    strength = rng.normal(size=(30, 1)) * 4 + rng.choice([-1, 1])
    negative = rng_rows(seed, 30)
    shift = torch.tensor(strength * planted / np.linalg.norm(planted) + 2, dtype=torch.float32)
    positive = negative + shift + 0.3 * rng_rows(seed + 50, 30)
    difference = (positive - negative).double().numpy()
    first = PCA(n_components=1).fit(difference).components_[0]
    along = difference.mean(0) @ first
    got = principal_component(positive, negative)
    assert np.allclose(got.numpy(), along * first, atol=1e-3)
    assert float((positive @ got).mean()) > float((negative @ got).mean())


@pytest.mark.parametrize("spread", [0.0, 1e-6, 0.05, 0.25, 3.0])
def test_pairs_that_differ_alike_are_told_of(spread):
    """The differences are c + spread e: a share spread^2 |e|^2 / |c|^2 of them varies."""
    common, noise = rng_rows(1, 1), rng_rows(2, 40)
    common, noise = common / common.norm(), noise / noise.norm(dim=1, keepdim=True)
    negative = rng_rows(3, 40)
    positive = negative + common + spread * noise
    alike = spread**2 < 0.01  # of the variance, in closed form
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = principal_component(positive, negative)
        mean_difference(positive, negative)
    assert [issubclass(w.category, SteerWarning) for w in told] == [True] * alike
    assert all("mean-difference is the method to use" in str(w.message) for w in told)
    assert found.isfinite().all()


def test_pairs_whose_differences_are_rounded_away_are_told_of():
    negative = 1e4 * rng_rows(3, 5)
    positive = negative * (1 + 1e-7)  # at most a last place
    assert not torch.equal(positive, negative)
    with pytest.warns(SteerWarning, match="all pairs differ alike"):
        principal_component(positive, negative)


def test_the_principal_component_of_swapped_sides_is_the_opposite():
    positive, negative = rng_rows(1, 9) + 1, rng_rows(2, 9)
    there = principal_component(positive, negative)
    assert torch.allclose(principal_component(negative, positive), -there, atol=1e-5)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (5, 4), (1, 9)])
def test_a_principal_component_needs_three_pairs(n, m):
    with pytest.raises(RequestError, match=f"got {n} positive and {m} negative"):
        principal_component(rng_rows(1, n), rng_rows(2, m))


def test_the_logistic_probe_is_sklearns_mapped_back():
    scales = torch.logspace(-2, 2, 12)
    planted = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1]) * scales
    positive, negative = rng_rows(1, 60) * scales + planted / 2, rng_rows(2, 50) * scales
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    pipeline.fit(np.concatenate([positive, negative]), [1] * 60 + [0] * 50)
    weights = pipeline[-1].coef_[0] / pipeline[0].scale_
    got = logistic_probe(positive, negative)
    assert cosine(got, weights) > 0.999
    unit = weights / np.linalg.norm(weights)
    along = float((positive.mean(0) - negative.mean(0)).double().numpy() @ unit)
    assert float(got.norm()) == pytest.approx(along, rel=1e-3)


def test_the_logistic_probe_recovers_a_planted_direction():
    planted = rng_rows(3, 1)[0]
    planted = planted / planted.norm()
    positive, negative = rng_rows(1, 400) + planted, rng_rows(2, 400) - planted
    got = logistic_probe(positive, negative)
    assert cosine(got, planted) > 0.97
    assert float((positive @ got).mean()) > float((negative @ got).mean())


def test_the_logistic_probe_ignores_a_nuisance_that_fools_the_mean_difference():
    rng = np.random.default_rng(0)
    nuisance = torch.tensor(rng.normal(size=(800, 1)) * 6, dtype=torch.float32)
    x = rng_rows(5, 800)
    x[:, :1] += nuisance
    x[:, 1:2] += nuisance + torch.tensor([[2.0]] * 400 + [[-2.0]] * 400)
    # the label is x[1] - x[0]; the means differ along x[1], drowned in what both share
    assert cosine(logistic_probe(x[:400], x[400:]), [-1, 1] + [0] * 10) > 0.97
    assert cosine(mean_difference(x[:400], x[400:]), [-1, 1] + [0] * 10) < 0.95


def test_the_logistic_probe_bears_a_constant_feature():
    positive, negative = rng_rows(1, 20) + 1, rng_rows(2, 20)
    positive[:, 4] = negative[:, 4] = 7.0
    got = logistic_probe(positive, negative)
    assert got.isfinite().all()
    assert got[4].abs() < 1e-3 * got.norm()


@pytest.mark.parametrize("method", METHODS)
def test_directions_solve_every_layer_on_its_own(method):
    positive = torch.stack([rng_rows(layer, 10) + layer for layer in range(1, 5)])
    negative = torch.stack([rng_rows(layer + 20, 10) for layer in range(1, 5)])
    found = Contrast(positive, negative, {"model": "m"}).directions(method, "joy")
    assert found.layers == (0, 1, 2, 3)
    assert found.name == "joy"
    for layer in range(4):
        want = METHODS[method](positive[layer], negative[layer])
        assert torch.allclose(found[layer].vector, want, rtol=1e-4, atol=1e-5)
        assert found[layer].hook_point == f"blocks.{layer}.hook_resid_post"
        assert dict(found[layer].source) == {"model": "m", "method": method}


def test_an_unknown_method_names_its_neighbours():
    contrast = Contrast(rng_rows(1, 4)[None], rng_rows(2, 4)[None])
    with pytest.raises(RequestError, match=r"'mean-diff'; nearest: mean-difference"):
        contrast.directions("mean-diff")


def test_equal_prompts_on_both_sides_point_nowhere(tiny):
    with pytest.raises(RequestError, match="points nowhere"):
        Contrast.measure(tiny, HAPPY, HAPPY).directions()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mean-difference", "logistic-probe"])
def test_a_real_models_direction_separates_prompts_that_it_was_not_made_from(starter, method):
    ends = ["wonderful", "delightful", "lovely", "superb", "terrible", "awful", "dreadful", "grim"]
    places = ["The food here is", "My journey was", "This film is", "Her letter was", "The day was"]
    good = [f"{place} {end}" for place in places for end in ends[:4]]
    bad = [f"{place} {end}" for place in places for end in ends[4:]]
    built = Contrast.measure(starter, good[:16], bad[:16], "last").directions(method)
    tested = Contrast.measure(starter, good[16:], bad[16:], "last")
    unit = built[15].unit
    assert (tested.positive[15] @ unit).min() > (tested.negative[15] @ unit).max()


# --- shuffled labels --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [6, 7])
def test_shuffled_pairs_stay_pairs_and_half_change_sides(n):
    contrast = Contrast(rng_rows(1, n)[None].repeat(3, 1, 1), rng_rows(2, n)[None].repeat(3, 1, 1))
    orders = set()
    for seed in range(40):
        mixed = contrast.shuffled(seed)
        swapped = []
        for i in range(n):
            kept = torch.equal(mixed.positive[:, i], contrast.positive[:, i])
            here = contrast.positive if kept else contrast.negative
            there = contrast.negative if kept else contrast.positive
            assert torch.equal(mixed.positive[:, i], here[:, i])
            assert torch.equal(mixed.negative[:, i], there[:, i])
            swapped.append(not kept)
        assert sum(swapped) == n // 2
        orders.add(tuple(swapped))
        assert torch.equal(mixed.positive, contrast.shuffled(seed).positive)
    assert len(orders) > 10


def test_shuffled_labels_without_pairs_are_drawn_anew():
    contrast = Contrast(rng_rows(1, 5)[None], rng_rows(2, 8)[None], {"model": "m"})
    mixed = contrast.shuffled(3)
    assert (mixed.positive.shape, mixed.negative.shape) == ((1, 5, 12), (1, 8, 12))
    before = torch.cat([contrast.positive, contrast.negative], 1)[0].tolist()
    after = torch.cat([mixed.positive, mixed.negative], 1)[0].tolist()
    assert sorted(after) == sorted(before)
    assert after != before
    assert mixed.source == {"model": "m", "control": "shuffled labels", "seed": "3"}


# --- ActAdd -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("negative", "first"), [("I hate the rain", 2), ("What is the tower", 1)])
def test_act_add_is_the_difference_of_one_pair_position_by_position(tiny, negative, first):
    positive = "I love the tower"
    pair = [tiny.encode(text).ids for text in (positive, negative)]
    assert pair[0][:first] == pair[1][:first]  # equal tokens: no difference, no direction
    assert pair[0][first] != pair[1][first]
    difference = streams(tiny, pair[0]) - streams(tiny, pair[1])
    found = act_add(tiny, positive, negative)
    positions = range(first, len(pair[0]))
    assert [one.name for one in found] == [f"actadd-p{i}" for i in positions]
    for one, position in zip(found, positions, strict=True):
        assert one.layers == tuple(range(tiny.n_layers))
        for layer in range(tiny.n_layers):
            want = difference[layer, position]
            assert np.allclose(one[layer].vector.numpy(), want, atol=1e-4)
            assert one[layer].source["position"] == str(position)


@pytest.mark.parametrize("negative", ["I hate the rain, no", "I"])
def test_act_add_refuses_prompts_of_different_lengths(tiny, negative):
    lengths = [len(tiny.encode(text).ids) for text in ("I love the tower", negative)]
    with pytest.raises(RequestError, match=rf"got {lengths[0]} and {lengths[1]}; pad"):
        act_add(tiny, "I love the tower", negative)


def test_act_add_refuses_prompts_of_one_token(tiny, monkeypatch):
    one = type(tiny.encode("I love"))((5,), (True,))
    monkeypatch.setattr(tiny, "encode", lambda prompt: one)
    with pytest.raises(RequestError, match="at least 2 tokens, got 1 and 1"):
        act_add(tiny, "a", "b")
