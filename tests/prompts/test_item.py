"""Items: what a prompt file may hold, and what is told of a file that is wrong."""

import json

import pytest

from interp_steer.errors import RequestError
from interp_steer.prompts.item import Item
from interp_steer.prompts.prompt import chat
from interp_steer.study.file import StudyFile


def test_every_form_of_a_prompt():
    assert Item.of("hi") == Item("hi")
    assert Item.of((("user", "hi"),)) == Item((("user", "hi"),))
    assert Item.of({"question": "hi", "positive": " yes", "negative": " no"}) == Item(
        "hi", positive=" yes", negative=" no"
    )
    assert Item.of({"prompt": "hi", "system": "Be brief."}).prompt == (
        ("system", "Be brief."),
        ("user", "hi"),
    )
    assert Item.of("hi", as_chat=True).prompt == (("user", "hi"),)
    for own, wanted in (({}, "S"), ({"system": "own"}, "own"), ({"system": None}, None)):
        given = {"prompt": "hi", "answer": "y", **own}
        assert Item.of(given, system="S").prompt == chat("hi", wanted, "y")
    assert Item.of({"prompt": "a", "continuation": " b"}, as_chat=True).prompt == "a"
    assert Item.of({"prompt": "q", "choices": [" a", " b"], "correct": 1}).choices == (" a", " b")


@pytest.mark.parametrize(
    "item",
    [
        Item("hi"),
        Item((("system", "s"), ("user", "u")), positive=" a", negative=" b"),
        Item("q", choices=(" a", " b"), correct=0),
        Item("clean", corrupted="other"),
        Item((("user", "u"),), corrupted=(("user", "v"),)),
        Item("a", continuation=" b"),
    ],
)
def test_a_mapping_reads_back_the_item(item):
    told = json.loads(json.dumps(item.as_mapping()))
    assert Item.of(told) == item
    assert Item.of(told).id == item.id


def test_ids_tell_contents_apart():
    several = [Item("a"), Item("b"), Item("a", positive="x", negative="y"), Item((("user", "a"),))]
    assert len({item.id for item in several}) == len(several)
    assert Item("a").id == Item("a").id


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"promt": "hi"}, "unknown field 'promt' of a prompt; nearest: prompt"),
        ({"Prompt": "hi"}, "unknown field 'Prompt' of a prompt; nearest: prompt"),
        ({"topic": "hi"}, "is no prompt.*expected a field prompt, instruction, question, text"),
        ({"prompt": "hi", "postive": " a"}, "nearest: positive"),
        ({"prompt": "hi", "positive": " a"}, "needs both answers"),
        ({"prompt": "hi", "positive": " a", "negative": " a"}, "same answer on both sides"),
        ({"prompt": "q", "choices": [" a"], "correct": 1}, "expected 0-0"),
        ({"prompt": "q", "choices": [" a"]}, "correct=None"),
        ({"prompt": "q", "choices": " ab", "correct": 0}, "choices is ' ab', expected a list"),
        ({"prompt": "q", "choices": ["a", 2], "correct": 0}, "choices hold 2, expected texts"),
        ({"prompt": "q", "choices": ["a", "b"], "correct": True}, "correct is True, expected a wh"),
        ({"prompt": "q", "choices": ["a", "b"], "correct": "1"}, "correct is '1', expected a wh"),
        ({"prompt": "q", "choices": ["a", "b"], "answer": 2}, "answer is 2, expected which of 2"),
        ({"prompt": "q", "choices": ["a", "b"], "answer": "C"}, "answer is 'C', expected which"),
        ({"prompt": "q", "choices": ["B", "A"], "answer": "A"}, "answer is 'A', expected which"),
        ({"prompt": "q", "mc1_targets": {"choices": ["a"], "labels": [0]}}, "of which one is 1"),
        ({"prompt": "q", "answer": 1}, "answer is 1, expected text"),
        ({"prompt": "q", "system": 1.5}, "system is 1.5, expected text"),
        ({"prompt": "q", "positive": 1, "negative": 2}, "positive is 1, expected text"),
        ({"prompt": "q", "continuation": True}, "continuation is True, expected text"),
        ({"prompt": "q", "corrupted": 3}, "corrupted is 3, expected text"),
        ({"prompt": 3}, "prompt is 3, expected text"),
        ({"prompt": " "}, "prompt is empty"),
        ({"messages": [{"role": "user"}]}, r"expected \[role, content\]"),
        ({"messages": [["user", 7]]}, r"expected \[role, content\]"),
        ({"messages": [["system", "a"], ["user", "b"]], "system": "c"}, "give one"),
        ({"positive": "I love it", "negative": "I hate it"}, "has no prompt, only texts of a con"),
        ({"prompt": "a", "continuation": ""}, "empty answer"),
        ({"messages": ["user", "hi"]}, "messages hold 'user', expected"),
        ({"messages": "hi"}, "messages are 'hi', expected"),
        (7, "is no prompt"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(given, said):
    with pytest.raises(RequestError, match=said) as caught:
        Item.of(given)
    assert "\n" not in str(caught.value)


def test_items_of_a_study_file_are_told_by_part_and_number(tmp_path):
    spec = "directions: {d: d}\nprompts: {prove: [Hi, %s]}\n"
    for entry, said in (
        ("7", "prove, entry 2: an entry is no prompt: 7, expected text"),
        ("{prompt: yes}", "prove, entry 2: prompt is True, expected text"),
        ("{prompt: a, answer: 1}", "prove, entry 2: answer is 1, expected text"),
        ("{prompt: a, positive: 1, negative: 2}", "prove, entry 2: positive is 1, expected text"),
    ):
        (tmp_path / "s.yaml").write_text(spec % entry)
        with pytest.raises(RequestError) as caught:
            StudyFile.read(tmp_path / "s.yaml")
        assert str(caught.value).startswith(said)
