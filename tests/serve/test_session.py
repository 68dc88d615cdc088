"""A talk: two histories, steering that changes, templates that forget, a file of it."""

import json

import pytest

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row, Sampling
from interp_steer.errors import RequestError
from interp_steer.model.model import SteeringModel
from interp_steer.serve.session import HELP, Session
from interp_steer.steering.direction import Direction
from interp_steer.steering.grammar import parse
from tests.conftest import make_llama

# as DeepSeek-R1-Distill-Llama's: thoughts of earlier answers are left out, new ones begun
THINKING = (
    "{{ bos_token }}{% for m in messages %}"
    "{% set said = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</think>' in said %}"
    "{% set said = said.split('</think>')[-1] %}{% endif %}"
    "<|start|>{{ m['role'] }}\n{{ said }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n<think>\n{% endif %}"
)
SHORT = Sampling(max_new_tokens=8)


@pytest.fixture
def known():
    import torch

    vector = torch.randn(64, generator=torch.Generator().manual_seed(3))
    return {"joy": Direction.of(vector, "blocks.2.hook_resid_post", "joy")}


def answer(talk, text):
    """Both answers of a turn, which becomes part of the talk."""
    turn = talk.command(text) if text.startswith("/") else talk.ask(text)
    texts = [result.text for result in Engine(talk.model).generate(turn.rows)]
    return turn, texts, talk.take(turn, texts)


def test_each_side_has_its_own_history(tiny, known):
    talk = Session(tiny, known, sampling=SHORT)
    talk.steer("add(joy, 8) at 2")
    _, first, kept = answer(talk, "Name three fruits.")
    turn, second, _ = answer(talk, "And now?")
    assert kept and first[0] != first[1]
    for row, mine, said in zip(turn.rows, second, first, strict=True):
        history = (("user", "Name three fruits."), ("assistant", said), ("user", "And now?"))
        assert row.prompt == history
        (expected,) = Engine(tiny).generate([Row(history, row.steer, SHORT)])
        assert mine == expected.text
    assert turn.titles == ("unsteered", "add(joy, 8.0) at 2") and not turn.notes


def test_steering_changes_and_mistakes_leave_all_as_it_was(tiny, known):
    talk = Session(tiny, known, sampling=SHORT)
    assert talk.command("/steer").startswith("Nothing is steered")
    assert "joy@" in talk.command("/steer add(joy, 3) at 2")
    for wrong, why in (("/steer add(joy, 3) at 9", "out of range"), ("/ster", "nearest: /steer"),
                       ("/steer add(jov, 3) at 2", "unknown direction"),
                       ("/compare add(joy, 1) at 1", "nothing was asked yet"),
                       ("/compare", "expected /compare LINE"), ("/save", "expected /save FILE"),
                       ("/save talk.json", "nothing was said")):  # fmt: skip
        with pytest.raises(RequestError, match=why):
            talk.command(wrong)
    assert talk.steps == parse("add(joy, 3) at 2", known)
    assert talk.command("/help") == HELP and talk.command("/steer off").startswith("Nothing")


def test_a_comparison_is_not_kept(tiny, known, tmp_path):
    talk = Session(tiny, known, sampling=SHORT)
    talk.steer("add(joy, 8) at 2")
    _, (_, steered), _ = answer(talk, "Name three fruits.")
    before = talk._histories
    turn, texts, _ = answer(talk, "/compare clamp(joy, 6) at 3")
    assert texts[0] == steered  # what stands there already
    assert turn.titles == ("add(joy, 8.0) at 2", "clamp(joy, 6.0) at 3")
    (expected,) = Engine(tiny).generate(
        [Row((("user", "Name three fruits."),), parse("clamp(joy, 6) at 3", known), SHORT)]
    )
    assert texts[1] == expected.text and talk._histories == before and len(talk.said) == 1


def test_a_talk_is_saved(tiny, known, tmp_path):
    talk = Session(tiny, known, "Be brief.", SHORT, 5)
    answer(talk, "Name three fruits.")
    path = tmp_path / "talk.json"
    assert str(path) in talk.command(f"/save {path}")
    talk.command(f"/save {path}")  # a talk may be written over
    told = json.loads(path.read_text())
    assert told["system"] == "Be brief." and told["seed"] == 5
    (turn,) = told["turns"]
    assert turn["user"] == "Name three fruits." and turn["steer"] == ""
    assert turn["unsteered"] == turn["steered"]
    (tmp_path / "other.json").write_text("{}")
    for name, why in (("other.json", "is no talk"), ("talk.txt", "expected a .json file")):
        with pytest.raises(RequestError, match=why):
            talk.command(f"/save {tmp_path / name}")


def test_a_template_that_drops_thoughts(tmp_path, known):
    """What was thought is not read again, which is told; the talk goes on for many turns."""
    folder = make_llama(tmp_path / "m")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": THINKING}))
    for file in folder.glob("chat_template*"):
        file.write_text(THINKING)
    talk = Session(SteeringModel.load(folder, device="cpu"), known, sampling=SHORT)
    talk.steer("add(joy, 2) at 2 on generated")
    turn = talk.ask("Name three fruits.")
    assert not turn.notes
    thought = "Fruits grow on trees.</think>Apple, pear, plum."
    assert talk.take(turn, [thought, thought])
    for count in range(3):
        turn = talk.ask(f"And number {count}?")
        assert turn.notes and "leaves out parts" in turn.notes[0]
        text = talk.model.encode(turn.rows[0].prompt).text
        assert "Fruits grow" not in text and text.count("Apple, pear, plum.") == count + 1
        assert text.endswith("<think>\n")
        texts = [result.text for result in Engine(talk.model).generate(turn.rows)]
        assert len(texts) == 2
        assert talk.take(turn, [thought, thought])
    # an answer that was cut amid a thought has nothing to be left out
    talk.reset()
    turn = talk.ask("Name three fruits.")
    talk.take(turn, ["Fruits grow", "Fruits grow"])
    assert not talk.ask("And now?").notes


def test_an_empty_answer_takes_the_question_back(tiny, known):
    talk = Session(tiny, known, sampling=SHORT)
    turn = talk.ask("Name three fruits.")
    assert not talk.take(turn, ["", "a"]) and not talk.said


def test_a_model_without_a_template_continues_texts(without_template, known, tmp_path):
    """Each text by itself, as a base model reads it; there is no conversation and no system."""
    talk = Session(without_template, known, sampling=SHORT)
    talk.steer("add(joy, 8) at 2")
    for text in ("The quick brown", "Paris is"):
        turn, texts, kept = answer(talk, text)
        rows = [Row(text, row.steer, SHORT) for row in turn.rows]
        assert kept and texts == [r.text for r in Engine(talk.model).generate(rows)]
        assert talk.last == (text, texts[0])
    _, compared, _ = answer(talk, "/compare add(joy, 4) at 3")
    assert compared[0] == texts[1] and len(talk.said) == 2
    talk.save(tmp_path / "talk.json")
    with pytest.raises(RequestError, match="takes no system prompt"):
        Session(without_template, known, "Be brief.")
