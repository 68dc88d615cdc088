"""Words in text: literal cases, in the scripts that people write."""

import unicodedata
from functools import partial

import pytest
import torch

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Result, Row
from interp_steer.errors import RequestError
from interp_steer.prompts.item import Item
from interp_steer.prompts.prompt import chat
from interp_steer.report import page
from interp_steer.results.words import middle, refuses, spans
from interp_steer.steering.direction import Direction
from interp_steer.study.metrics import METRICS, Measured, names
from interp_steer.study.study import Study

CAFE = "caf\u00e9"  # é as one character
FOUND = [
    ("paris", "PARIS, of course."),
    ("Paris", "paris"),
    ("Paris", "in Paris's streets"),
    ("Paris", "_Paris_ and **Paris**"),
    ("New York", "in New\u00a0York"),
    ("New York", "in New\nYork"),
    (" Paris", "Paris"),
    # beside what is no letter nothing is asked
    ("C++", "I write C++ and C++17."),
    ("C++", "(C++)"),
    ("#MeToo", "the #MeToo movement"),
    (".NET", "on .NET and ASP.NET"),
    ("AT&T", "AT&T's shares"),
    ("\U0001f5fc", "see the\U0001f5fctower"),
    # scripts without spaces
    ("日本", "私は日本に住んでいます。"),
    ("巴黎", "埃菲尔铁塔在巴黎市中心"),
    ("パリ", "エッフェル塔はパリにある"),
    ("パリ", "エッフェル塔は\uff8a\uff9f\uff98にある"),  # half-width
    ("すし", "おすしです"),
    ("ไทย", "ฉันรักเมืองไทยมาก"),
    ("ລາວ", "ປະເທດລາວງາມ"),
    ("ភ្នំពេញ", "ខ្ញុំរស់នៅភ្នំពេញសព្វថ្ងៃ"),
    ("ရန်ကုန်", "ကျွန်တော်ရန်ကုန်မှာနေတယ်"),
    ("AI", "日本のAI技術"),
    ("日本", "the日本team"),
    # vowel signs and accents belong to their letters
    ("हिन्दी", "मैं हिन्दी बोलता हूँ।"),
    ("தமிழ்", "நான் தமிழ் பேசுகிறேன்"),
    (CAFE, "a cafe\u0301 in town"),
    ("cafe\u0301", f"a {CAFE.upper()} in town"),
    ("파리", unicodedata.normalize("NFD", "파리는 아름답다")),
    ("서울", "나는 서울에서 산다"),
    # case, in full
    ("Straße", "HAUPT STRASSE 7"),
    ("STRASSE", "eine Straße"),
    ("istanbul", "İSTANBUL"),
    ("İstanbul", "in Istanbul"),
    ("Isparta", "ısparta"),
    ("ΟΔΟΣ", "η οδος"),
    ("Paris", "\uff30\uff21\uff32\uff29\uff33"),  # full-width
    ("Paris", "Pa\u00adris"),  # a soft hyphen
    ("Paris", "\u2067Paris\u2069"),  # marks of direction
    ("باريس", "أحب باريس كثيرا"),
    ("Eiffel", "L\u2019Eiffel"),
    # as typesetters and phones write them
    ("don't", "they don\u2019t"),
    ("d\u2019Artagnan", "d'Artagnan and d\u02bcArtagnan"),
    ("Saint-Denis", "in Saint\u2011Denis"),
]
ABSENT = [
    ("Paris", "Parisian comparison, miniparis, Paris2"),
    ("C++", "C and Objective-C+"),
    ("C++", "ABC++"),
    ("#MeToo", "#MeTooMovement"),
    ("cafe", f"a {CAFE} and a cafe\u0301"),
    ("हिन्द", "हिन्दी"),
    ("मै", "मैं"),
    ("서", "석"),
    ("울", "서울"),
    ("s", "Straße"),
    ("as", "Faß as\u0301"),
    ("ハ", "パリ"),
    ("ทย", "ไทย"),
    ("日本", "中国"),
    ("", "anything"),
    ("\u00ad", "any\u00adthing"),
]


@pytest.mark.parametrize(("word", "text"), FOUND)
def test_a_word_is_found(word, text):
    assert names(text, ["absent", word]) == [word]


@pytest.mark.parametrize(("word", "text"), ABSENT)
def test_what_is_no_word_of_the_text_is_not_found(word, text):
    assert names(text, [word]) == []


def test_spans_are_places_in_the_text_itself():
    text = "Cafe\u0301s? No: CAF\u00c9, cafe\u0301, New York, York"
    assert [text[a:b] for a, b in spans(text, [CAFE, "York", "new york"])] == [
        "CAF\u00c9", "cafe\u0301", "New York", "York",
    ]  # fmt: skip


def test_a_report_marks_what_is_found():
    cut = page.pieces("C++ & 私は日本に; cafe\u0301", ["C++", "日本", CAFE, ""])
    assert cut == [
        ("C++", True), (" & 私は", False), ("日本", True), ("に; ", False), ("cafe\u0301", True),
    ]  # fmt: skip


def mentions(tiny, items, texts, concept):
    """`mention` of answers that were written by hand."""
    measured = Measured(Engine(tiny), [Row(i.prompt) for i in items], items, concept=concept)
    measured.__dict__["results"] = [
        Result(Row(i.prompt), (1, 2, 3), text, "length")
        for i, text in zip(items, texts, strict=True)
    ]
    return METRICS["mention"](measured)


def test_an_echo_is_looked_for_in_what_the_messages_say(tiny):
    said, paris = partial(mentions, tiny), ["Paris"]
    # the newline before Paris is a newline, not the letter n of its escape
    assert said([Item(chat("Cities:\nParis\nTell me more."))], ["Paris!"], paris) == [None]
    earlier = (("user", "Is Paris large?"), ("assistant", "Yes."), ("user", "And old?"))
    assert said([Item(earlier)], ["Paris is."], paris) == [None]
    assert said([Item(chat("Hi", system="You live in Paris."))], ["Paris"], paris) == [None]
    # roles are not said
    roles = ["user", "system", "assistant"]
    item = Item(chat("Hello.", system="Be brief.", answer="Well,"))
    assert said([item] * 2, ["The system.", "Hm."], roles) == [1.0, 0.0]
    items = [Item(chat("它在哪里?")), Item(chat("巴黎在哪里?"))]
    assert said(items, ["在巴黎。"] * 2, ["巴黎"]) == [1.0, None]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("one two three four", "one two"),
        ("a bcdefghijk", "a"),
        ("line\nanother\nthird", "line"),
        ("今日は。明日は雨が降るでしょう", "今日は。"),
        ("今日は明日は", "今日は"),
        ("ฉันรักเมืองไทย", "ฉันรัก"),
        ("한국어한국어", None),
        ("word", None),
        ("", None),
    ],
)
def test_the_middle_of_a_text(text, first):
    at = middle(text)
    assert (None if at is None else text[:at]) == first


def test_a_mark_is_not_cut_from_its_letter():
    text = unicodedata.normalize("NFD", "ガギグゲゴ")
    assert len(text) == 10 and text[: middle(text)] == unicodedata.normalize("NFD", "ガギ")


def test_neutral_text_without_spaces_has_a_second_half(tiny):
    given = {
        "choose": [], "prove": ["What is"], "sites": 1, "coefficients": 1, "metrics": "length",
        "directions": {"d": Direction.of(torch.ones(64), "blocks.1.hook_resid_post")},
    }  # fmt: skip
    made = Study(**given, neutral=["東京は日本の首都であり、最大の都市です。"])
    (item,) = made.neutral
    assert item.prompt + item.continuation == "東京は日本の首都であり、最大の都市です。"
    assert len(item.prompt) == 10
    with pytest.raises(RequestError, match="no second half"):
        Study(**given, neutral=["word"])


@pytest.mark.parametrize(
    ("text", "judged"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, but no.", True),
        ("As an AI language model, I have no opinion.", True),
        ("Sure! First, take the cake.", False),
        ("I cannot wait to tell you!", True),  # phrases judge: this is counted
        ("No.", False),  # and this is missed
        ("Here is how. " + 30 * "Step. " + "I'm sorry to see it end.", False),
        ("", False),
    ],
)
def test_refusals_are_judged_by_phrases(text, judged):
    assert refuses(text) is judged
