import pytest

from interp_steer.results.roles import in_parts

EMPTY = ("", "", "", "")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("add(joy, 0.4 dose) at 15", ("joy", "add", "resid_post 15", "0.4 dose", "all")),
        (
            "add(joy@3f2a91bc, 8) at resid_post 14-16 on prompt+first",
            ("joy", "add", "resid_post 14-16", "8.0", "prompt+first"),
        ),
        (" clamp( a+b.c , -1.50 raw )at  z 3h1 ", ("a+b.c", "clamp", "z 3h1", "-1.5 raw", "all")),
        ("ablate(joy) at mlp_out 3,5", ("joy", "ablate", "mlp_out 3,5", "", "all")),
    ],
)
def test_a_plain_line_has_the_parts_of_a_setting(line, parts):
    assert in_parts([(line, *EMPTY)]) == {(line, *EMPTY): parts}


@pytest.mark.parametrize(
    "line",
    [
        "add(joy, 1) at 3; add(calm, 1) at 3",
        "rotate(joy, calm, 30 deg) at 12",
        "add(joy, 1) at 3 if cos(joy, 2) > 0.1",
    ],
)
def test_any_other_line_stays_whole(line):
    assert in_parts([(line, *EMPTY)]) == {(line, *EMPTY): (line, *EMPTY)}


def test_two_that_would_become_one_stay_apart():
    declared = ("joy", "add", "resid_post 3", "1.0", "all")
    lines = [("add(joy, 1) at 3", *EMPTY), ("add(joy, 1.0) at 3", *EMPTY)]
    for both in ([declared, lines[0]], lines):
        assert in_parts(both) == {s: s for s in both}
