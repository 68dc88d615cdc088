"""Screening: each score against a computation of its own through plain Hugging Face."""

import pytest
import torch

from interp_steer.errors import RequestError
from interp_steer.features.contexts import Context
from interp_steer.features.sae import Sae
from interp_steer.features.screen import PROMPT, TOKENS, output_scores, promoted, screen
from interp_steer.steering.direction import Direction
from tests.conftest import hf_streams
from tests.features.test_fit import identity
from tests.features.test_sae import LAYER, saved


@pytest.fixture(scope="module")
def sae(tmp_path_factory) -> Sae:
    return Sae.load(saved(tmp_path_factory.mktemp("sae"), "topk"))


def raised(model, sae: Sae, index: int, times: float):
    """Next-token logits of the neutral prompt, plain and with the latent raised at its end."""
    ids = model.tokenizer(PROMPT)["input_ids"]
    lift = times * sae.encode(hf_streams(model, ids)[LAYER + 1][0, -1]).max()

    def hook(_m, _a, out):
        out = out.clone()
        out[:, -1] += lift * sae.rows(torch.tensor(index))
        return out

    with torch.no_grad():
        plain = model.hf(torch.tensor([ids])).logits[0, -1]
        handle = model.hf.model.layers[LAYER].register_forward_hook(hook)
        logits = model.hf(torch.tensor([ids])).logits[0, -1]
        handle.remove()
    return plain, logits


def test_promoted_tokens_are_the_logit_lens(tiny, sae):
    rows = sae.rows(torch.tensor([3, 200]))
    ids, texts = promoted(tiny, rows)
    for row, mine, words in zip(rows, ids, texts, strict=True):
        normed = row / row.square().mean().sqrt() * tiny.hf.model.norm.weight
        expected = (normed @ tiny.hf.lm_head.weight.T).topk(TOKENS).indices.tolist()
        assert mine == expected
        assert words == [tiny.tokenizer.decode([i]) for i in expected]


def test_short_rows_promote_the_same(tiny, sae):
    rows = sae.rows(torch.tensor([3, 200]))
    assert promoted(tiny, rows * 1e-4) == promoted(tiny, rows)


@pytest.mark.parametrize(("batch", "lift"), [(256, 10.0), (2, 10.0), (256, 0.1)])
def test_output_score_and_confidence(tiny, sae, batch, lift, monkeypatch):
    """By 10 a feature's own tokens become the likeliest, by 0.1 they have ranks of all kinds."""
    monkeypatch.setattr("interp_steer.features.screen.RAISE", lift)
    chosen = [3, 200, 11, 90, 255]
    best = []
    found = screen(sae, tiny, chosen, batch=batch)
    assert [one.index for one in found] == chosen
    for one in found:
        plain, logits = raised(tiny, sae, one.index, lift)
        tokens = promoted(tiny, sae.rows(torch.tensor([one.index])))[0][0]
        p = logits.softmax(-1)
        ranks = {int(t): r for r, t in enumerate(p.argsort(descending=True))}
        best.append(min(ranks[t] for t in tokens))
        expected = (1 - best[-1] / len(p)) * max(p[t].item() for t in tokens)
        assert one.output_score == pytest.approx(expected, rel=1e-3)
        spread = [
            -x.log_softmax(-1).sort(descending=True).values[:TOKENS].mean().item()
            for x in (logits, plain)
        ]
        assert one.confidence == pytest.approx(spread[0] - spread[1], abs=1e-3)
        assert one.norm == pytest.approx(sae.rows(torch.tensor(one.index)).norm().item(), rel=1e-5)
    assert lift == 10 or max(best) > 1


def test_output_score_of_any_direction(tiny, sae):
    """Raised by the length that a latent's raise has, a decoder row scores as its feature does."""
    ids = tiny.tokenizer(PROMPT)["input_ids"]
    latents = sae.encode(hf_streams(tiny, ids)[LAYER + 1][0, -1])
    rows = sae.rows(torch.tensor([3, 200, 11]))
    hook_point = f"blocks.{LAYER}.hook_resid_post"
    for index, row in zip((3, 200, 11), rows, strict=True):
        length = (10 * latents.max() * row.norm()).item()
        found = output_scores(tiny, [Direction.of(row, hook_point)], length)
        (feature,) = screen(sae, tiny, [index])
        assert found == pytest.approx([feature.output_score], rel=1e-4)
    every = [Direction.of(row, hook_point) for row in rows]
    alone = [output_scores(tiny, [one], 20.0)[0] for one in every]
    assert output_scores(tiny, every, 20.0, batch=2) == pytest.approx(alone, rel=1e-4)
    with pytest.raises(RequestError, match="expected above 0"):
        output_scores(tiny, every, 0.0)


def test_a_prompt_on_which_nothing_is_active_is_refused(tiny, tmp_path):
    """Ten times nothing raises nothing: every feature would get the plain prompt's scores."""
    with pytest.raises(RequestError, match="no latent is active at the last token of 'From my"):
        screen(identity(tmp_path / "deaf", threshold=1e6), tiny, [3])


def test_input_score_is_a_share_of_contexts(tiny, sae):
    tokens = promoted(tiny, sae.rows(torch.tensor([3])))[1][0]
    inside, outside = tokens[4], next(t for t in ("tower", "x", "@") if t not in tokens)
    contexts = {3: [Context(0, 1, 2.0, "", token, "") for token in (inside, outside, inside, "?")]}
    with_contexts, without = (
        screen(sae, tiny, [3], contexts=contexts)[0],
        screen(sae, tiny, [3], density={3: 0.25})[0],
    )
    expected = sum(t in tokens for t in (inside, outside, inside, "?")) / 4
    assert with_contexts.input_score == expected and expected >= 0.5
    assert without.input_score is None and without.density == 0.25
