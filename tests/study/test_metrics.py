"""Metrics against plain Hugging Face passes with a hook, and against counts made by hand."""

import itertools
import math

import pytest
import torch

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row, Sampling
from interp_steer.errors import RequestError
from interp_steer.prompts.item import Item
from interp_steer.prompts.prompt import chat
from interp_steer.results.words import OPENINGS
from interp_steer.steering.direction import Direction
from interp_steer.steering.grammar import steer
from interp_steer.study.measured import beginnings
from interp_steer.study.metrics import METRICS, Measured, distinct, find, metric, rep3

LAYER = 2


@pytest.fixture(scope="module")
def pushed(tiny):
    vector = torch.randn(tiny.d_model, generator=torch.Generator().manual_seed(3))
    direction = Direction.of(vector, f"blocks.{LAYER}.hook_resid_post")
    return (steer("add", direction, coefficient=6.0, at=LAYER, on="all+first"),)


def reference(model, ids, one=None):
    """Log-probabilities [pos, vocab] from Hugging Face alone, with a plain hook."""
    handle = None
    if one:
        delta = one[0].directions[0].unit * one[0].value

        def change(_m, _i, out):
            return out + delta if isinstance(out, torch.Tensor) else (out[0] + delta, *out[1:])

        handle = model.hf.model.layers[LAYER].register_forward_hook(change)
    with torch.no_grad():
        logits = model.hf(torch.tensor([ids])).logits[0].float()
    if handle:
        handle.remove()
    return logits.log_softmax(-1)


def of(model, text):
    return tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])


PROMPTS = ["The quick brown", "What is the tallest mountain, and who", "I love"]


def made(tiny, pushed, items, **more):
    rows = [Row(i.prompt, s, Sampling(max_new_tokens=9)) for i in items for s in ((), pushed)]
    return Measured(Engine(tiny), rows, [i for i in items for _ in range(2)], **more)


def test_counts_by_hand():
    assert rep3([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4)
    assert rep3([1, 2]) is None
    assert distinct([1, 1, 1, 2], 2) == pytest.approx(2 / 3)
    assert distinct([], 1) is None


def test_surprise_and_length(tiny, pushed):
    items = [Item(p) for p in PROMPTS]
    measured = made(tiny, pushed, items)
    got = METRICS["surprise"](measured)
    lengths = METRICS["length"](measured)
    for row, result, value, length in zip(
        measured.rows, measured.results, got, lengths, strict=True
    ):
        ids = tiny.encode(row.prompt).ids
        logs = reference(tiny, [*ids, *result.token_ids])
        own = [logs[len(ids) - 1 + i, t].item() for i, t in enumerate(result.token_ids)]
        assert length == len(result.token_ids)
        if own:
            assert value == pytest.approx(-sum(own) / len(own), abs=1e-4)
        else:
            assert value is None


def test_kl_is_that_of_hugging_face_on_the_same_continuation(tiny, pushed):
    items = [Item(p) for p in PROMPTS]
    plain = Engine(tiny).generate([Row(p, (), Sampling(max_new_tokens=5)) for p in PROMPTS])
    answers = [r.token_ids for r in plain for _ in range(2)]
    measured = made(tiny, pushed, items, unsteered=answers)
    last, mean = METRICS["kl_last"](measured), METRICS["kl_mean"](measured)
    for i, (row, answer) in enumerate(zip(measured.rows, answers, strict=True)):
        ids = tiny.encode(row.prompt).ids
        p = reference(tiny, [*ids, *answer])[len(ids) - 1 :]
        q = reference(tiny, [*ids, *answer], row.steer)[len(ids) - 1 :]
        kl = (p.exp() * (p - q)).sum(-1)
        assert last[i] == pytest.approx(kl[0].item(), abs=1e-4)
        assert mean[i] == pytest.approx(kl.mean().item(), abs=1e-4)
    assert last[0] == 0 and last[1] > 1e-3


def test_the_probability_of_a_concept_is_that_of_hugging_face(tiny, pushed):
    items = [Item(p) for p in PROMPTS]
    words = ("Paris", "rain")
    begin = [" Paris", "Paris", " paris", "paris", " rain", "rain", " Rain", "Rain"]
    first = {tiny.tokenizer.encode(one, add_special_tokens=False)[0] for one in begin}
    tokens = [i for i in first if len(tiny.tokenizer.decode([i]).strip()) >= 3]
    assert set(beginnings(tiny, words)) == set(tokens) and tokens
    plain = Engine(tiny).generate([Row(p, (), Sampling(max_new_tokens=5)) for p in PROMPTS])
    answers = [r.token_ids for r in plain for _ in range(2)]
    measured = made(tiny, pushed, items, unsteered=answers, concept=words)
    got = METRICS["concept_logprob"](measured)
    for value, row, answer in zip(got, measured.rows, answers, strict=True):
        ids = tiny.encode(row.prompt).ids
        p = reference(tiny, [*ids, *answer], row.steer)[len(ids) - 1 :].exp()
        assert value == pytest.approx(p[:, tokens].sum(-1).mean().log().item(), abs=1e-4)
    # " E" begins too many words to stand for one
    one = tiny.tokenizer.encode(" Eiffel", add_special_tokens=False)[0]
    short = len(tiny.tokenizer.decode([one]).strip()) < 3
    assert (one in beginnings(tiny, ["Eiffel"])) != short


def test_refusal_by_log_probability(tiny, pushed):
    """The sum over openings of what Hugging Face gives each; no opening begins another."""
    items = [Item("Tell me how"), Item(chat("How is it done?"))]
    got = METRICS["refusal_logprob"](made(tiny, pushed, items))
    assert not [(a, b) for a in OPENINGS for b in OPENINGS if a != b and b.startswith(a)]
    for value, (item, setting) in zip(got, itertools.product(items, ((), pushed)), strict=True):
        ids, total = tiny.encode(item.prompt).ids, 0.0
        for opening in OPENINGS:
            after = of(tiny, f" {opening}" if item is items[0] else opening)
            logs = reference(tiny, [*ids, *after], setting)[len(ids) - 1 :]
            total += math.exp(sum(logs[k, t].item() for k, t in enumerate(after)))
        assert value == pytest.approx(math.log(total), abs=1e-3)
    assert len({round(value, 2) for value in got}) == 4


def test_pairs(tiny, pushed):
    items = [
        Item(PROMPTS[0], positive=" fox jumps", negative=" dog"),
        Item(PROMPTS[1], positive=" climbed it first", negative=" climbed the lazy dog"),
    ]
    measured = made(tiny, pushed, items)
    difference = METRICS["logit_difference"](measured)
    propensity = METRICS["propensity"](measured)
    each = METRICS["propensity_per_token"](measured)
    share = METRICS["p_matching"](measured)
    for i, (row, item) in enumerate(zip(measured.rows, measured.items, strict=True)):
        ids = tiny.encode(row.prompt).ids
        sides = []
        for text in (item.positive, item.negative):
            after = of(tiny, text)
            logs = reference(tiny, [*ids, *after], row.steer)[len(ids) - 1 :]
            sides.append((after, [logs[k, t].item() for k, t in enumerate(after)], logs))
        (a, logs_a, all_a), (b, logs_b, _) = sides
        at = next(k for k in range(len(a)) if a[k] != b[k])
        assert propensity[i] == pytest.approx(sum(logs_a) - sum(logs_b), abs=2e-4)
        odds = [math.exp(sum(logs)) for logs in (logs_a, logs_b)]
        assert share[i] == pytest.approx(odds[0] / sum(odds), abs=1e-4)
        means = sum(logs_a) / len(a) - sum(logs_b) / len(b)
        assert each[i] == pytest.approx(means, abs=2e-4)
        assert difference[i] == pytest.approx(
            (all_a[at, a[at]] - all_a[at, b[at]]).item(), abs=2e-4
        )
    assert at > 0  # the second pair shares its beginning
    with pytest.raises(RequestError, match="one begins the other"):
        METRICS["logit_difference"](
            made(tiny, pushed, [Item(PROMPTS[0], positive=" dog", negative=" dog.")])
        )


def test_accuracy_and_loss(tiny, pushed):
    items = [
        Item(PROMPTS[0], choices=(" fox", " dog jumps", " e"), correct=0),
        Item(PROMPTS[1], choices=(" mountain", " fox"), correct=1),
    ]
    measured = made(tiny, pushed, items)
    got = METRICS["accuracy"](measured)
    for value, row, item in zip(got, measured.rows, measured.items, strict=True):
        ids = tiny.encode(row.prompt).ids
        sums = []
        for text in item.choices:
            after = of(tiny, text)
            logs = reference(tiny, [*ids, *after], row.steer)[len(ids) - 1 :]
            sums.append(sum(logs[k, t].item() for k, t in enumerate(after)))
        assert value == float(sums.index(max(sums)) == item.correct)
    texts = [Item("The quick brown", continuation=" fox jumps over")]
    losses = METRICS["loss"](made(tiny, pushed, texts))
    ids, after = tiny.encode(texts[0].prompt).ids, of(tiny, texts[0].continuation)
    for value, one in zip(losses, ((), pushed), strict=True):
        logs = reference(tiny, [*ids, *after], one)[len(ids) - 1 :]
        own = [logs[k, t].item() for k, t in enumerate(after)]
        assert value == pytest.approx(-sum(own) / len(own), abs=1e-4)


def test_concept_leaves_out_echoes_and_loops(tiny):
    from interp_steer.engine.row import Result

    def result(text, ids=tuple(range(9))):
        return Result(Row("x"), tuple(ids), text, "length")

    items = [
        Item("Tell me about Paris."),
        Item("Hello."),
        Item("Hello."),
        Item("Paris and Eiffel?"),
    ]
    measured = Measured(
        Engine(tiny), [Row(i.prompt) for i in items], items, concept=["Paris", "Eiffel"]
    )
    measured.__dict__["results"] = [
        result("Paris is lovely."),  # an echo
        result("I went to paris."),
        result("Eiffel", [1, 2, 3] * 6),  # loops
        result("Paris, Eiffel"),  # nothing but echoes possible
    ]
    assert METRICS["mention"](measured) == [0.0, 1.0, 1.0, None]
    assert METRICS["concept"](measured) == [0.0, 1.0, 0.0, None]


def test_a_metric_is_one_function_and_one_decorator(tiny):
    @metric(kind="rate", better="low", unit="share")
    def shouting(measured):
        """Answers in capitals.

        More words.
        """
        return [float("nan"), float("inf"), 1.0]

    try:
        found = find("shouting")
        assert (found.kind, found.better, found.about) == ("rate", "low", "Answers in capitals.")
        assert found(Measured(Engine(tiny), [], [])) == [None, None, 1.0]
        with pytest.raises(RequestError, match="nearest: shouting"):
            find("shoting")
    finally:
        del METRICS["shouting"]
    with pytest.raises(RequestError, match="cannot be 'hihg'; nearest: high"):
        metric(better="hihg")
