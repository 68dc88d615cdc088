"""Cards: what they declare, and that a random direction is not declared to steer."""

import json

import pytest
import torch

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row, Sampling
from interp_steer.errors import RequestError
from interp_steer.prompts.file import read_items
from interp_steer.prompts.prompt import chat
from interp_steer.steering.direction import Direction
from interp_steer.steering.grammar import parse
from interp_steer.steering.scale import Scale
from interp_steer.study.measured import beginnings
from interp_steer.tune.card import QUESTIONS, card, dosed, words_of
from tests.conftest import error

WORDS = ("rain", "Paris")
HOOK = "blocks.2.hook_resid_post"


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (
            "Paris, Duluth, Louis (promotes: where, 's, and): Lake Supe",
            ("Paris", "Duluth", "Louis"),
        ),
        ("references to the Eiffel Tower and Paris", ("Eiffel", "Tower", "Paris")),
        ("Paris and PARIS, the city", ("Paris", "city")),
        ("to, of, in", ()),
        ("words related to specific terms", ()),
    ],
)
def test_the_words_of_a_label(label, words):
    assert words_of(label) == words


@pytest.fixture(scope="module")
def direction(tiny):
    """The rows of the output matrix that the words read, which raises them."""
    rows = tiny.hf.lm_head.weight.detach()
    tokens = list(beginnings(tiny, WORDS))
    return Direction.of(rows[tokens].mean(0) - rows.mean(0), HOOK, "rainy")


@pytest.fixture(scope="module")
def made(tiny, direction, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    return card(tiny, direction, folder, words=WORDS, budget=100.0)


def test_what_raises_its_words_is_declared_to_steer(made):
    assert made.steers and made.findings.verdict.p == pytest.approx(0.05)
    assert "add(rainy" in made.verdict and made.dose == 0.45
    rows = made.curve.query("who == 'this'").set_index("dose")
    assert list(rows["effect"]) == sorted(rows["effect"]) and rows["effect"].min() > 0
    others = made.curve.query("who != 'this'").groupby("dose")["effect"].mean()
    assert (rows["effect"] > others).all()


def test_the_curve_is_that_of_hugging_face_alone(tiny, direction, made):
    """The effect at a dose, by a hook of PyTorch on the Hugging Face module."""
    items = made.findings.table.query("split == 'prove' and role == 'unsteered'")
    every = [chat(item.text) for item in read_items(QUESTIONS)]
    held_out = [text for text in every if text[0][1] in set(items["prompt"])]
    selection = [text for text in every if text not in held_out]
    assert (len(selection), len(held_out)) == (6, 10)
    tokens, effects = list(beginnings(tiny, WORDS)), []
    norm = Scale.of(tiny, [tiny.encode(text) for text in selection]).at(direction.site)
    said = Engine(tiny).generate([Row(text, (), Sampling(max_new_tokens=20)) for text in held_out])
    for text, answer in zip(held_out, said, strict=True):
        ids, values = tiny.encode(text).ids, []
        for length in (0.0, 0.3 * norm):

            def add(_module, _inputs, out, length=length):
                x = out if isinstance(out, torch.Tensor) else out[0]
                x = x.clone()
                x[:, 1:] += length * direction.unit  # the first position is never steered
                return x if isinstance(out, torch.Tensor) else (x, *out[1:])

            handle = tiny.hf.model.layers[2].register_forward_hook(add)
            with torch.no_grad():
                logits = tiny.hf(torch.tensor([[*ids, *answer.token_ids]])).logits[0].float()
            handle.remove()
            p = logits[len(ids) - 1 :].softmax(-1)[:, tokens].sum(-1)
            values.append(p.mean().log().item())
        effects.append(values[1] - values[0])
    claim = made.findings.claims.query("role == 'chosen' and metric == 'concept_logprob'").iloc[0]
    last = made.curve.query("who == 'this' and dose == 0.45").iloc[0]
    assert last["effect"] == pytest.approx(claim["effect"], abs=1e-4), "one unit on all the card"
    row = made.curve.query("who == 'this' and dose == 0.3").iloc[0]
    assert row["effect"] == pytest.approx(sum(effects) / len(effects), abs=2e-3)


@pytest.mark.slow
def test_its_texts_are_what_the_engine_says(tiny, direction, made):
    said = made.said.set_index("arm")
    assert list(said.index) == ["unsteered", "steered", "prompted"]
    assert said.loc["unsteered", "kl_mean"] == 0
    scale = Scale.of(tiny, [tiny.encode(chat(item.text)) for item in read_items(QUESTIONS)])
    assert scale.at(direction.site) > 0 and len(made.texts) == 3
    prompt = made.texts[0]["prompt"]
    steps = made.findings.table.query("role == 'chosen'")["steer"].iloc[0]
    one = parse(steps.replace("this", "rainy").split("@")[0] + "," + steps.split(",", 1)[1],
                {"rainy": direction})  # fmt: skip
    (result,) = Engine(tiny).generate([Row(chat(prompt), one, Sampling(max_new_tokens=32))])
    assert made.texts[0]["steered"][:20] == result.text[:20]


@pytest.mark.slow
def test_it_is_told_in_three_forms(made, tmp_path):
    told = json.loads(json.dumps(made.as_json()))
    assert told["verdict"]["steers"] is True and told["words"] == list(WORDS)
    text = str(made)
    assert "operating point" in text and "prompted" in text and "promotes" in text
    page = made.write(tmp_path / "card.html").read_text()
    assert '<p class="verdict yes">' in page and page.count("<img") == 2
    assert "http" not in page.replace("http-equiv", "")
    assert "Dose curve" in made._repr_html_()


@pytest.mark.slow
def test_the_same_again_runs_nothing(tiny, direction, made):
    before = {path: path.read_bytes() for path in made.folder.rglob("rows.jsonl")}
    again = card(tiny, direction, made.folder, words=WORDS, budget=100.0)
    assert len(before) == 3 and again.verdict == made.verdict
    assert {path: path.read_bytes() for path in before} == before


def test_without_words_nothing_is_declared(tiny, direction, tmp_path):
    one = card(tiny, direction, tmp_path, controls=1)
    assert one.steers is None and "give words" in one.verdict and len(one.texts) == 3
    assert "give words" in one.write(tmp_path / "card.html").read_text()
    with pytest.raises(RequestError, match="no token begins"):
        card(tiny, direction, tmp_path, words=["\u0416\u0416\u0416\u0416"], controls=1)


@pytest.mark.slow
def test_random_directions_are_seldom_declared_to_steer(tiny, direction, tmp_path):
    """Exchangeable with 19 controls, a random direction is the best of 20 once in 20."""
    items = read_items(QUESTIONS)
    alarms = 0
    for n in range(60):
        one = direction.random(5000 + n).named("one")
        study = dosed(one, WORDS, items[:4], items[4:], doses=(0.2, 0.4), budget=100.0)
        alarms += bool(study.run(tiny, tmp_path / "RUN").findings().verdict.steers)
    assert alarms <= 8, "by chance once in 500 runs"


@pytest.mark.slow
def test_a_feature_has_its_fit_and_where_it_fires(starter, tmp_path):
    from interp_steer.features.feature import feature

    items = read_items(QUESTIONS)[:8]
    one = feature("starter", 2652)
    made = card(starter, one, tmp_path, words=["Paris"], prompts=items, doses=(0.3,), controls=1)
    assert 0.5 < made.fit.explained_variance < 1 and len(made.contexts) == 5
    values = [place.activation for place in made.contexts]
    assert values == sorted(values, reverse=True) and made.screened["index"] == 2652


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "no direction and no feature 'nowhere'"),
        (["starter/99999999"], "99999999"),
        (["starter/2652", "--prompts", "none.txt"], "no prompt file"),
    ],
)
def test_what_is_no_direction_is_one_line(words, expected):
    assert expected in error(2, "card", *words)
