"""Parts that prompts play: split by question, and kept apart."""

import pytest

from interp_steer.errors import RequestError
from interp_steer.prompts.item import Item
from interp_steer.prompts.parts import check_apart, split_items
from interp_steer.prompts.prompt import chat


def test_split_is_fixed_and_whole():
    items = [f"p{i}" for i in range(11)]
    choose, prove = split_items(items)
    assert sorted([*choose, *prove]) == sorted(items) and len(choose) == 6
    assert split_items(items) == (choose, prove) != split_items(items, seed=17)
    with pytest.raises(RequestError, match="cannot be split"):
        split_items(["one"])


def test_one_question_lands_in_one_part():
    asked = [f"Question {i // 3}?" for i in range(30)]
    items = [chat(text, f"System {i}") for i, text in enumerate(asked)]
    for seed in range(20):
        parts = split_items(items, 0.5, seed)
        questions = [{item[1][1] for item in part} for part in parts]
        assert not questions[0] & questions[1] and all(questions)
        assert sorted([*parts[0], *parts[1]]) == sorted(items)
        assert 12 <= len(parts[0]) <= 18
    with pytest.raises(RequestError, match="4 prompts ask 1 questions, which cannot be split"):
        split_items([chat("Why?", f"System {i}") for i in range(4)])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Item("Why?"), Item("  why? ")),
        (Item(chat("Why?", "Be brief.")), Item(chat("Why?"))),
        (Item(chat("Why?", answer="(A)")), Item("Why?", positive=" a", negative=" b")),
        (Item("one two three"), Item("one two", continuation=" three")),
        (Item("one two"), Item("one two", continuation=" three")),
    ],
)
def test_a_question_stands_in_one_part(first, second):
    expected = r"is asked in both build and prove; a prompt plays one part only$"
    for one, other in ((first, second), (second, first)):
        with pytest.raises(RequestError, match=expected):
            check_apart({"build": [Item("Who?"), one], "choose": [], "prove": [other]})
        check_apart({"build": [one, other], "prove": [Item("Who?")]})  # twice in one part


def test_what_only_begins_alike_is_another_question():
    check_apart({"choose": [Item("one two three")], "prove": [Item("one two", continuation=" 3")]})
