import itertools

import pytest

from interp_steer.errors import RequestError
from interp_steer.steering.grammar import parse, steer
from interp_steer.steering.spread import spread
from tests.steering.test_intervention import JOY, KNOWN


def test_every_value_of_braces_makes_a_line():
    made = spread("add(joy, {0.2, 0.4} dose) at {8-20/4}").lines
    expected = [
        f"add(joy, {dose} dose) at {layer}"
        for dose, layer in itertools.product(("0.2", "0.4"), (8, 12, 16, 20))
    ]
    assert made == expected
    assert len({parse(text, KNOWN) for text in made}) == 8


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("add(joy, 1) at 3", ["add(joy, 1) at 3"]),
        ("", [""]),
        ("{0.2-0.6/0.2} dose", ["0.2 dose", "0.4 dose", "0.6 dose"]),  # not 0.6000000000000001
        ("{-4-4/4}", ["-4", "0", "4"]),
        ("{-0.4,0.4}", ["-0.4", "0.4"]),
        ("{8-10,12,20-30/10}", ["8", "9", "10", "12", "20", "30"]),
        ("{8-11/2}", ["8", "10"]),  # the stride does not meet the end
        ("{a+b-c.d_é,joy} {x}", ["a+b-c.d_é x", "joy x"]),
        ("{z 15h3,z 15h4}", ["z 15h3", "z 15h4"]),
    ],
)
def test_values_and_ranges(text, lines):
    assert spread(text).lines == lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("add({joy,{calm}}, 1)", "at column 5: '{' without its other brace"),
        ("at 3}", "at column 5: '}' without"),
        ("at {}", "lacks a value"),
        ("at {3,,4}", "lacks a value"),
        ("at {3,4,3}", "holds 3 twice"),
        ("at {3-5,4}", "holds 4 twice"),
        ("{0.2-0.6} dose", "has no stride; write {0.2-0.6/0.1}"),
        ("at {9-3}", "give the lower end first"),
        ("at {3-9/0}", "a stride above 0"),
        ("at {0-999999}", "1,000,000 values"),
        ("{0-999} {0-999}", "1,000,000 lines"),
    ],
)
def test_what_cannot_be_spread_is_refused(text, expected):
    with pytest.raises(RequestError) as refused:
        spread(text)
    assert expected in str(refused.value) and "\n" not in str(refused.value)


def test_a_stride_steers_its_layers_together():
    (step,) = parse("add(joy, 1) at mlp_out 8-20/4,25 + 3-7/2", KNOWN)
    assert [(s.component, s.layer) for s in step.sites] == [
        *(("mlp_out", n) for n in (8, 12, 16, 20, 25)),
        *(("resid_post", n) for n in (3, 5, 7)),
    ]
    assert parse(str(step), KNOWN) == (step,)
    assert [s.layer for s in steer("add", JOY, coefficient=1, at="0-6/3").sites] == [0, 3, 6]


@pytest.mark.parametrize("text", ["add(joy, 1) at 8-20/0", "add(joy, 1) at 8/2"])
def test_a_stride_needs_a_range_and_a_number(text):
    with pytest.raises(RequestError, match="at column"):
        parse(text, KNOWN)


def test_one_line_takes_no_braces():
    with pytest.raises(RequestError, match=r"stands for 2 lines, and one is expected"):
        parse("add(joy, {1,2}) at 3", KNOWN)
