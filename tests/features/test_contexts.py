"""Where features fire: against a second, plain computation, and scikit-learn's AUROC."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from interp_steer import RequestError, chat
from interp_steer.features.contexts import auroc, find, top_contexts, top_features, windows
from interp_steer.features.sae import Sae
from tests.conftest import hf_streams
from tests.features.test_sae import LATENTS, LAYER, saved

TEXTS = [
    "I love the tower; I hate the rain.",
    "Name three fruits.",
    "Yes, no, maybe: happy and sad.",
    "What is the tallest mountain, and who climbed it first?",
    "The quick brown fox jumps over the lazy dog.",
]


@pytest.fixture(scope="module")
def sae(tmp_path_factory) -> Sae:
    return Sae.load(saved(tmp_path_factory.mktemp("sae"), "topk"))


@pytest.fixture(scope="module")
def encoded(tiny):
    return [tiny.encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def latents(tiny, sae, encoded) -> list[torch.Tensor]:
    """Every text's latents from Hugging Face's stream, one text a pass, the first position 0."""
    each = [sae.encode(hf_streams(tiny, one.ids)[LAYER + 1][0]) for one in encoded]
    for one in each:
        one[0] = 0
    return each


def test_top_features_of_a_prompt(tiny, sae, encoded, latents):
    found = top_features(sae, tiny, encoded[3], k=10)
    peaks = latents[3].amax(0)
    expected = sorted(range(LATENTS), key=lambda i: -peaks[i])[:10]
    assert [one.index for one in found] == expected
    for one in found:
        assert one.activation == pytest.approx(peaks[one.index].item(), rel=1e-4)
        assert latents[3][one.position, one.index] == pytest.approx(one.activation, rel=1e-4)
        assert one.token == tiny.tokenizer.decode([encoded[3].ids[one.position]])
        assert one.mean == pytest.approx(latents[3][1:, one.index].mean().item(), rel=1e-4)


def test_a_chats_template_does_not_count(tiny, sae):
    said = tiny.encode(chat("Name three fruits."))
    latents = sae.encode(hf_streams(tiny, said.ids)[LAYER + 1][0])
    latents[~torch.tensor(said.content)] = 0
    found = top_features(sae, tiny, said, k=10)
    peaks = latents.amax(0)
    assert [one.index for one in found] == sorted(range(LATENTS), key=lambda i: -peaks[i])[:10]
    assert all(said.content[one.position] for one in found)


@pytest.mark.parametrize("features", [None, [7, 3, 250]])
def test_top_contexts(tiny, sae, encoded, latents, features):
    found = top_contexts(sae, tiny, encoded, features, k=3, width=4)
    assert list(found) == (features or list(range(LATENTS)))
    for index, contexts in found.items():
        peaks = [(one[:, index].max().item(), n) for n, one in enumerate(latents)]
        expected = sorted([p for p in peaks if p[0] > 0], reverse=True)[:3]
        assert [c.text for c in contexts] == [n for _, n in expected]
        for context, (value, n) in zip(contexts, expected, strict=True):
            assert context.activation == pytest.approx(value, rel=1e-4)
            ids, at = encoded[n].ids, context.position
            assert at == latents[n][:, index].argmax()
            assert context.before == tiny.decode(ids[max(0, at - 4) : at])
            assert context.token == tiny.tokenizer.decode([ids[at]])
            assert context.after == tiny.decode(ids[at + 1 : at + 5])


def test_auroc_is_scikit_learns():
    draw = np.random.default_rng(0)
    up, down = draw.integers(0, 4, (9, 30)), draw.integers(0, 4, (14, 30))  # many ties
    mine = auroc(torch.tensor(up).float(), torch.tensor(down).float())
    for column in range(30):
        values = np.concatenate([up[:, column], down[:, column]])
        expected = roc_auc_score([1] * 9 + [0] * 14, values)
        assert mine[column].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("by", ["auroc", "difference"])
def test_find(tiny, sae, encoded, latents, by):
    found = find(sae, tiny, encoded[:2], encoded[2:], k=8, by=by)
    means = torch.stack([one[1:].mean(0) for one in latents])
    difference = means[:2].mean(0) - means[2:].mean(0)
    area = [
        roc_auc_score([1, 1, 0, 0, 0], means[:, i]) for i in range(LATENTS)
    ]  # fmt: skip
    key = {
        "auroc": lambda i: (round(area[i], 6), difference[i]),
        "difference": difference.__getitem__,
    }
    expected = sorted(range(LATENTS), key=key[by], reverse=True)[:8]
    assert [one.index for one in found] == expected
    for one in found:
        assert one.auroc == pytest.approx(area[one.index], abs=1e-6)
        assert one.difference == pytest.approx(difference[one.index].item(), rel=1e-3)
        assert one.positive - one.negative == pytest.approx(one.difference, rel=1e-3)


def test_bad_requests(tiny, sae, encoded):
    with pytest.raises(RequestError, match="auroc or difference, not by 'size'"):
        find(sae, tiny, encoded[:1], encoded[1:], by="size")
    with pytest.raises(RequestError, match="two tokens or more"):
        find(sae, tiny, [], encoded)
    with pytest.raises(RequestError, match="feature 999 is out of range"):
        top_contexts(sae, tiny, encoded, [999])


def test_windows_cut_texts_and_keep_every_token(tiny):
    long = " ".join(TEXTS * 40)  # more than the model's context
    ids = tiny.tokenizer(long)["input_ids"]
    pieces = windows(tiny, [long], 100)
    assert [i for piece in pieces for i in piece.ids] == ids
    assert {len(piece.ids) for piece in pieces[:-1]} == {100}
    short = chat("Name three fruits.")
    assert windows(tiny, [short], 500)[0].ids == tiny.encode(short).ids
    with pytest.raises(RequestError, match="two tokens or more"):
        windows(tiny, [""], 100)
