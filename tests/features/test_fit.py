"""The fit check against SAELens's metrics, Hugging Face's loss, and SAEs with known answers."""

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig

from interp_steer import RequestError, chat
from interp_steer.features.fit import Tally, _ce_score, check
from interp_steer.features.sae import Sae
from interp_steer.prompts.prompt import Encoded
from tests.conftest import hf_streams
from tests.features.test_sae import LAYER, WIDTH, saved

TEXTS = [
    "I love the tower; I hate the rain.",
    "Name three fruits.",
    "Yes, no, maybe: happy and sad.",
]


def identity(folder, threshold: float = 0.0, model: str = "tiny", scale: float = 1.0):
    """An SAE that gives back what it gets: latents are the positive and the negative parts of each
    coordinate. With a threshold it drops what is small; `scale` is what it multiplies its input by.
    """
    kind, config = (
        (JumpReLUSAE, JumpReLUSAEConfig) if threshold else (StandardSAE, StandardSAEConfig)
    )
    sae = kind(config(d_in=WIDTH, d_sae=2 * WIDTH))
    both = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    with torch.no_grad():
        for weight in sae.parameters():
            weight.zero_()
        sae.W_dec.copy_(both)
        sae.W_enc.copy_(both.T * scale)
        if threshold:
            sae.threshold.fill_(threshold)
    sae.cfg.metadata.hook_name = f"blocks.{LAYER}.hook_resid_post"
    sae.cfg.metadata.model_name = model
    sae.save_model(folder)
    return Sae.load(folder)


@pytest.fixture
def encoded(tiny) -> list[Encoded]:
    return [tiny.encode(chat(text)) for text in TEXTS]


def test_an_sae_that_gives_everything_back(tiny, encoded, tmp_path):
    fit = check(identity(tmp_path / "same"), tiny, encoded)
    assert fit.explained_variance == pytest.approx(1)
    assert fit.norm_ratio == pytest.approx(1) and fit.cosine == pytest.approx(1)
    assert fit.l0 == pytest.approx(WIDTH)  # one of the two parts of each coordinate
    assert fit.ce_spliced == pytest.approx(fit.ce, abs=1e-5)
    assert fit.best_scale == 1
    assert fit.tokens == sum(len(one.ids) - 1 for one in encoded)
    if fit.ce_score is not None:
        assert fit.ce_score == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_numbers_are_saelens_own(tiny, encoded, tmp_path, kind):
    """SAELens's explained variance and L0 of the same activations, read from Hugging Face."""
    from sae_lens import SAE
    from sae_lens.evals import ExplainedVarianceCalculator

    folder = saved(tmp_path / kind, kind)
    theirs, fit = SAE.load_from_disk(folder), check(Sae.load(folder), tiny, encoded)
    x = torch.cat([hf_streams(tiny, one.ids)[LAYER + 1][0, 1:] for one in encoded])
    with torch.no_grad():
        latents = theirs.encode(x)
        back = theirs.decode(latents)
    calculator = ExplainedVarianceCalculator()
    calculator.add_batch(sae_output=back, hidden_acts=x)
    assert fit.massive == 0
    assert fit.explained_variance == pytest.approx(float(calculator.compute()), abs=1e-4)
    assert fit.explained_variance_all == fit.explained_variance
    assert fit.l0 == pytest.approx((latents > 0).sum(-1).float().mean().item(), abs=1e-4)
    ratios = back.norm(dim=-1) / x.norm(dim=-1)
    assert fit.norm_ratio == pytest.approx(ratios.median().item(), rel=1e-4)
    assert fit.silent == pytest.approx((latents == 0).all(0).float().mean().item())


def test_cross_entropies_are_hugging_faces(tiny, encoded, tmp_path):
    folder = saved(tmp_path / "topk", "topk")
    sae = Sae.load(folder)
    fit = check(sae, tiny, encoded)
    sums = {"ce": 0.0, "ce_spliced": 0.0, "ce_ablated": 0.0}
    changes = {"ce": lambda x: x, "ce_spliced": lambda x: sae.decode(sae.encode(x)),
               "ce_ablated": torch.zeros_like}  # fmt: skip
    for name, change in changes.items():
        for one in encoded:

            def hook(_m, _a, out, change=change):
                x = out[0] if isinstance(out, tuple) else out
                moved = torch.cat([x[:, :1], change(x[:, 1:])], 1)
                return (moved, *out[1:]) if isinstance(out, tuple) else moved

            handle = tiny.hf.model.layers[LAYER].register_forward_hook(hook)
            ids = torch.tensor([one.ids])
            with torch.no_grad():
                sums[name] += tiny.hf(ids, labels=ids).loss.item() * (len(one.ids) - 1)
            handle.remove()
    for name, total in sums.items():
        assert getattr(fit, name) == pytest.approx(total / fit.tokens, rel=1e-4)
    if fit.ce_ablated > fit.ce:
        expected = (fit.ce_ablated - fit.ce_spliced) / (fit.ce_ablated - fit.ce)
        assert fit.ce_score == pytest.approx(expected)
    else:
        assert fit.ce_score is None and any("no CE-loss score" in w for w in fit.warnings)


@pytest.mark.parametrize(
    ("losses", "score"),
    [
        ((1.0, 1.5, 3.0), 0.75),
        ((1.0, 1.5, 1.0), None),
        ((1.0, 1.5, 0.9), None),
        ((1.0, 1.5, 1.0 + 1e-6), None),  # by rounding alone it would be -500,000
    ],
)
def test_the_ce_score_is_a_share_of_a_harm_that_is_there(losses, score):
    assert _ce_score(*losses) == score


def test_one_token_has_no_variance_to_explain(tiny, tmp_path):
    sae = identity(tmp_path / "same")
    with pytest.raises(RequestError, match=r"1 tokens were read .* no variance to explain"):
        check(sae, tiny, [Encoded((0, 5), (True, True))], loss_texts=0)


def test_the_first_position_does_not_count(tiny, encoded, tmp_path):
    """The stream's first position is made huge; nothing may change."""
    sae = Sae.load(saved(tmp_path / "topk", "topk"))
    before = check(sae, tiny, encoded, loss_texts=0)
    handle = tiny.hf.model.layers[LAYER].register_forward_hook(
        lambda _m, _a, out: torch.cat([out[:, :1] * 1000, out[:, 1:]], 1)
    )
    try:
        after = check(sae, tiny, encoded, loss_texts=0)
    finally:
        handle.remove()
    assert after == before


def test_a_massive_activation_does_not_decide_the_explained_variance(tiny, encoded, tmp_path):
    """One token is made huge and given back whole: counted in, it would hide all else."""
    sae = Sae.load(saved(tmp_path / "topk", "topk"))
    streams = [hf_streams(tiny, one.ids)[LAYER + 1][0, 1:] for one in encoded]
    tally = Tally(sae.d_model, sae.d_sae)
    for number, x in enumerate(streams):
        back = sae.decode(sae.encode(x))
        if number == 1:
            x = x.clone()
            x[4] *= 1000
            back[4] = x[4]
        tally.add(x, sae.encode(x), back)
    kept = torch.cat([x[[i for i in range(len(x)) if (n, i) != (1, 4)]] for n, x in
                      enumerate(streams)]).double()  # fmt: skip
    back = sae.decode(sae.encode(kept.float())).double()
    expected = 1 - ((kept - back) ** 2).sum() / ((kept - kept.mean(0)) ** 2).sum()
    assert tally.numbers["explained_variance"] == pytest.approx(expected.item(), abs=1e-4)
    assert tally.numbers["explained_variance_all"] > 0.99 > tally.numbers["explained_variance"]
    assert tally.numbers["massive"] == pytest.approx(1 / tally.tokens)
    before = tally.numbers["explained_variance"]
    alone = streams[0][2:3] * 1000  # a text that is all sink
    tally.add(alone, sae.encode(alone), alone)
    assert tally.numbers["explained_variance"] == before


def test_a_wrong_scale_is_noticed(tiny, encoded, tmp_path):
    """A threshold made for activations 32 times as long drops nearly everything."""
    x = torch.cat([hf_streams(tiny, one.ids)[LAYER + 1][0, 1:] for one in encoded])
    wrong = check(identity(tmp_path / "wrong", 8 * x.abs().median().item()), tiny, encoded)
    assert wrong.best_scale > 1
    assert any("in other units" in warning for warning in wrong.warnings)
    right = check(identity(tmp_path / "right", 0.01 * x.abs().median().item()), tiny, encoded)
    assert right.best_scale == 1 and not any("in other units" in w for w in right.warnings)


def test_too_long_reconstructions_are_noticed(tiny, encoded, tmp_path):
    fit = check(identity(tmp_path / "long", scale=3.0), tiny, encoded)
    assert fit.norm_ratio == pytest.approx(3)
    assert any("3.00 times as long" in warning for warning in fit.warnings)


@pytest.mark.parametrize(
    ("trained_on", "expected"),
    [
        ("meta-llama/Llama-3.1-8B", "a base model"),
        ("meta-llama/Llama-3.1-8B-Instruct", "was trained on meta-llama/Llama-3.1-8B-Instruct; "),
    ],
)
def test_an_sae_of_another_model_is_said(tiny, encoded, tmp_path, trained_on, expected):
    fit = check(identity(tmp_path / "other", model=trained_on), tiny, encoded, loss_texts=0)
    assert any(expected in warning for warning in fit.warnings)


def test_tallies_add_up_over_texts(tiny, encoded, tmp_path):
    sae = Sae.load(saved(tmp_path / "topk", "topk"))
    tally = Tally(sae.d_model, sae.d_sae)
    for one in encoded:
        check(sae, tiny, [one], loss_texts=0, tally=tally)
    whole = Tally(sae.d_model, sae.d_sae)
    check(sae, tiny, encoded, loss_texts=0, tally=whole)
    assert tally.tokens == whole.tokens and torch.equal(tally.fired, whole.fired)
    torch.testing.assert_close(tally.peak, whole.peak)


def test_nothing_to_read_is_an_error(tiny, tmp_path):
    with pytest.raises(RequestError, match="no text is two tokens long"):
        check(identity(tmp_path / "same"), tiny, [Encoded((0,), (True,))])
