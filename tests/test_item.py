"""Items: what a prompt file may hold, and what is told of a file that is wrong."""

import json

import pytest

from interp_steer.errors import RequestError
from interp_steer.item import Item, read_items


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
        ({"promt": "hi"}, "is no prompt"),
        ({"prompt": "hi", "postive": " a"}, "nearest: positive"),
        ({"prompt": "hi", "positive": " a"}, "needs both answers"),
        ({"prompt": "hi", "positive": " a", "negative": " a"}, "same answer on both sides"),
        ({"prompt": "q", "choices": [" a"], "correct": 1}, "expected 0-0"),
        ({"prompt": "q", "choices": [" a"]}, "correct=None"),
        ({"prompt": "q", "choices": " ab", "correct": 0}, "wrong kind"),
        ({"prompt": "q", "correct": True, "choices": ["a", "b"]}, "wrong kind"),
        ({"prompt": "a", "continuation": ""}, "empty answer"),
        ({"messages": ["user", "hi"]}, "messages are"),
        (7, "is no prompt"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(given, said):
    with pytest.raises(RequestError, match=said) as caught:
        Item.of(given)
    assert "\n" not in str(caught.value)


def test_files_name_the_entry_that_is_wrong(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "positive": "x"}\n')
    with pytest.raises(RequestError, match=r"p\.jsonl, entry 2: 'b' needs both"):
        read_items(path)
    path.write_text("")
    with pytest.raises(RequestError, match="holds no prompts"):
        read_items(path)
    with pytest.raises(RequestError, match="no prompt file"):
        read_items(tmp_path / "q.txt")
