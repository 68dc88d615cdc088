"""The Jacobian lens against J from one-hot rows, finite differences, and autograd's own Jacobian of
the Hugging Face module.
"""

import pytest
import torch

from interp_steer.errors import RequestError, RunError
from interp_steer.prompts.prompt import Encoded
from interp_steer.steering.jacobian import token_of, word_directions
from interp_steer.steering.lens import JacobianLens
from tests.conftest import hf_streams

SKIP = 4


@pytest.fixture(scope="module")
def texts(tiny) -> list[Encoded]:
    draw = torch.Generator().manual_seed(5)
    made = [torch.randint(3, 300, (n,), generator=draw).tolist() for n in (12, 9, 15, 5, 20)]
    return [Encoded(tuple(ids), (True,) * len(ids)) for ids in made]


@pytest.fixture(scope="module")
def lens(tiny, texts) -> JacobianLens:
    return JacobianLens.fit(tiny, texts, skip=SKIP, length=16)


def after(model, ids, layer, x):
    """The stream after the last block, of a stream after `layer`, by Hugging Face's blocks."""
    hf = model.hf.model
    where = torch.arange(len(ids))[None]
    rotary = hf.rotary_emb(x, position_ids=where)
    for one in hf.layers[layer + 1 :]:
        out = one(x, position_embeddings=rotary, attention_mask=None)
        x = out if isinstance(out, torch.Tensor) else out[0]
    return x


def test_j_is_the_jacobian_of_hugging_faces_blocks(tiny, texts, lens):
    """Summed over targets, averaged over sources, a mean over texts of equal weight."""
    layer = 3
    total = torch.zeros(tiny.d_model, tiny.d_model)
    count = 0
    for one in texts:
        ids = one.ids[:16]
        counted = range(SKIP, len(ids) - 1)
        if len(ids) < SKIP + 2:
            continue
        x = hf_streams(tiny, ids)[layer + 1].detach()

        def summed(x, ids=ids, counted=counted):
            return after(tiny, ids, layer, x)[0, list(counted)].sum(0)

        jacobian = torch.autograd.functional.jacobian(summed, x)[:, 0, list(counted)]
        total += jacobian.mean(1)
        count += 1
    assert lens.n_prompts == count == 4  # one text is too short
    assert torch.allclose(lens[layer], total / count, atol=2e-5)


def row_of(model, word, published=True):
    weight = model.hf.lm_head.weight.detach()
    row = weight[token_of(model, word)]
    return row if published else (row - weight.mean(0)) * model.hf.model.norm.weight.detach()


@pytest.mark.parametrize("published", [False, True])
def test_a_words_direction_is_what_reads_it_times_j(tiny, texts, lens, published, monkeypatch):
    gains = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.5
    monkeypatch.setattr(tiny.hf.model.norm.weight, "data", gains)
    found = word_directions(tiny, ["fox", "dog"], texts, published=published, skip=SKIP, length=16)
    for word in ("fox", "dog"):
        row = row_of(tiny, word, published)
        for layer in range(5):
            one = found[word].directions[layer]
            assert torch.allclose(one.vector, row @ lens[layer], atol=1e-5)
            alike = torch.cosine_similarity(one.vector, row, dim=0).item()
            assert found[word].lens[layer] == pytest.approx(alike, abs=1e-5)
            from_file = lens.word(tiny, word, layer, published)
            assert torch.allclose(from_file.vector, one.vector, atol=1e-5)


def test_a_word_alone_and_among_others_is_the_same(tiny, texts):
    alone = word_directions(tiny, ["dog"], texts, layers=[1, 4], skip=SKIP)["dog"]
    among = word_directions(tiny, ["fox", "dog"], texts, skip=SKIP)["dog"]
    for layer in (1, 4):
        assert torch.allclose(alone.directions[layer].vector, among.directions[layer].vector,
                              rtol=1e-4, atol=1e-6)  # fmt: skip


def test_halves_are_the_even_and_the_odd_texts(tiny, texts):
    whole = word_directions(tiny, ["fox"], texts, layers=[2], skip=SKIP)["fox"]
    long = [one for one in texts if len(one.ids) >= SKIP + 2]
    parts = [
        word_directions(tiny, ["fox"], some, layers=[2], skip=SKIP)["fox"].directions[2]
        for some in (long[::2], long[1::2])
    ]
    assert whole.halves[0] == pytest.approx(parts[0].cosine(parts[1]), abs=1e-5)
    assert word_directions(tiny, ["fox"], long[:1], layers=[2], skip=SKIP)["fox"].halves == (None,)


def test_adding_it_raises_the_words_summed_logit_as_the_slope_says(tiny, texts):
    """A central difference of r x_F, summed over the positions that count."""
    one, layer, step = texts[0], 2, 1e-2
    ids = one.ids
    v = word_directions(tiny, ["fox"], [one], layers=[layer], skip=SKIP)["fox"].directions[layer]
    row = row_of(tiny, "fox", published=False)
    counted = range(SKIP, len(ids) - 1)
    x = hf_streams(tiny, ids)[layer + 1].detach()
    slopes = []
    for p in counted:
        moved = torch.zeros_like(x)
        moved[0, p] = v.unit
        ends = [after(tiny, ids, layer, x + sign * step * moved)[0] for sign in (1, -1)]
        slopes.append(((ends[0] - ends[1])[list(counted)] @ row).sum().item() / (2 * step))
    assert sum(slopes) / len(slopes) == pytest.approx(v.norm, rel=2e-3)


def test_a_file_holds_float16_and_is_read_a_layer_at_a_time(tiny, lens, tmp_path):
    path = lens.save(tmp_path / "lens.pt")
    again = JacobianLens.load(path, tiny)
    assert (again.layers, again.n_prompts, again.d_model) == ((0, 1, 2, 3, 4), 4, 64)
    for layer in lens.layers:
        assert torch.equal(again[layer], lens[layer].half().float())
    state = torch.load(path, weights_only=True)  # as others read it
    assert state["source_layers"] == [0, 1, 2, 3, 4] and state["J"][2].dtype == torch.float16


def test_files_of_others(tiny, lens, tmp_path):
    """Text for layers, float32, no count of prompts."""
    state = {"J": {"0": lens[0], "3": lens[3]}}
    torch.save(state, tmp_path / "other.pt")
    found = JacobianLens.load(tmp_path / "other.pt", tiny)
    assert found.layers == (0, 3) and torch.equal(found[3], lens[3]) and found.n_prompts == 0


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"J": {0: torch.eye(8)}}, "8 wide"),
        ({"J": {5: torch.eye(64)}}, "has layer 5; after the last block"),
        ({"J": {0: torch.eye(64)}, "target_layer": 4}, "ends at layer 4"),
        ({"J": {0: torch.ones(64, 3)}}, "other shapes"),
        ({"jacobian_sum": {}, "n_done": 3}, "not ended"),
        ({"weights": 1}, "no Jacobian lens"),
    ],
)
def test_a_lens_that_does_not_fit_is_refused(tiny, tmp_path, state, expected):
    torch.save(state, tmp_path / "lens.pt")
    with pytest.raises(RequestError, match=expected):
        JacobianLens.load(tmp_path / "lens.pt", tiny)


def test_what_is_no_file_of_torchs(tiny, tmp_path):
    (tmp_path / "lens.pt").write_bytes(b"no lens")
    with pytest.raises(RunError, match="cannot be read as a lens"):
        JacobianLens.load(tmp_path / "lens.pt", tiny)
    with pytest.raises(RequestError, match="no lens file"):
        JacobianLens.load(tmp_path / "gone.pt", tiny)


def test_the_identity_is_the_logit_lens(tiny):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    eye = JacobianLens((2,), 64, 1, {}, {2: torch.eye(64)})
    assert torch.equal(eye.read(tiny, 2, x), tiny.unembed(x))
    assert torch.equal(eye.read(tiny, 5, x), tiny.unembed(x))  # the model's own


@pytest.mark.parametrize(
    ("words", "more", "expected"),
    [
        ([], {}, "no word"),
        (["extraordinarily"], {}, "is no single token"),
        (["fox"], {"layers": [5]}, "after the last block, 5, it is the identity"),
        (["fox"], {"layers": []}, "layers none"),
        (["fox"], {"skip": 40}, "none of 5 texts is 42 tokens long"),
        (["fox"], {"skip": 127}, "expected 0 to 126"),
    ],
)
def test_what_cannot_be_right_is_refused(tiny, texts, words, more, expected):
    with pytest.raises(RequestError, match=expected):
        word_directions(tiny, words, texts, **{"skip": SKIP, **more})
