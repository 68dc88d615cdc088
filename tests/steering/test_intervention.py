import math
import random

import pytest
import torch

from interp_steer.errors import RequestError
from interp_steer.model.site import COMPONENTS, Site
from interp_steer.steering.direction import Direction, DirectionSet
from interp_steer.steering.grammar import parse, steer
from interp_steer.steering.intervention import (
    CLAMPS,
    OPERATORS,
    SCOPES,
    Gate,
    Intervention,
    Scope,
    line,
)
from interp_steer.steering.scale import Scale

WIDTH = 8


def one_way(seed: int, name: str, layer: int = 0, width: int = WIDTH, **more) -> Direction:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return Direction.of(vector, f"blocks.{layer}.hook_resid_post", name, **more)


JOY, SAD = one_way(1, "joy"), one_way(2, "sad", max_activation=4.0)
FEAR = one_way(3, "a+b-c.d_é")
LAYERED = DirectionSet(one_way(10 + i, "caa", i, max_activation=1.0 + i) for i in range(30))
KNOWN = {one.name: one for one in (JOY, SAD, FEAR, LAYERED)}


# --- text and back ----------------------------------------------------------------------------


def any_sites(draw: random.Random) -> tuple[Site, ...]:
    found: list[Site] = []
    for _ in range(draw.randint(1, 4)):
        component = draw.choice(COMPONENTS)
        layer = draw.randint(0, 20)
        if component == "z":
            found.append(Site("z", layer, draw.randint(0, 9)))
        else:
            found += [Site(component, layer + i) for i in range(draw.randint(1, 4))]
    if draw.random() < 0.3:
        draw.shuffle(found)
    return tuple(dict.fromkeys(found))


def any_number(draw: random.Random) -> float:
    forms = [
        draw.uniform(-20, 20),
        float(draw.randint(-9, 9)),
        10.0 ** draw.randint(-30, 15),
        -draw.random() * 1e-7,
        0.1 + 0.2,
        0.0,
    ]
    return draw.choice(forms)


def any_scope(draw: random.Random) -> Scope:
    kind = draw.choice(SCOPES)
    begin = draw.randint(0, 9) if kind == "positions" else 0
    end = begin + draw.choice([0, 3, 500]) if kind == "positions" else 0
    return Scope(kind, begin, end, draw.random() < 0.3)


def any_intervention(seed: int) -> Intervention:
    draw = random.Random(seed)
    # latent_clamp takes features alone; its lines are read back in test_sae.py
    operator = draw.choice([one for one in OPERATORS if one != "latent_clamp"])
    count, units = OPERATORS[operator]
    gate = None
    if draw.random() < 0.4:
        site = Site(draw.choice(["resid_pre", "resid_post"]), draw.randint(0, 20))
        gate = Gate(draw.choice(list(KNOWN.values())), site, draw.random() < 0.5, any_number(draw))
    return Intervention(
        operator,
        tuple(draw.choice(list(KNOWN.values())) for _ in range(count)),
        any_number(draw) if units else 0.0,
        draw.choice(units) if units else "",
        any_sites(draw),
        any_scope(draw),
        gate,
    )


@pytest.mark.parametrize("start", range(0, 600, 100))
def test_every_intervention_is_read_back_from_its_line(start):
    for seed in range(start, start + 100):
        one = any_intervention(seed)
        text = line([one])
        assert "\n" not in text
        (found,) = parse(text, KNOWN)
        assert found == one, text
        assert hash(found) == hash(one)
        assert line([found]) == text
        assert [d.name for d in found.directions] == [d.name for d in one.directions]


def test_several_interventions_are_read_back_in_order():
    for seed in range(50):
        many = tuple(any_intervention(1000 * seed + i) for i in range(seed % 5))
        assert parse(line(many), KNOWN) == many


def test_different_interventions_have_different_lines():
    many = {any_intervention(seed) for seed in range(600)}
    assert len({line([one]) for one in many}) == len(many) > 590


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_no_text_is_no_intervention(text):
    assert parse(text, {}) == ()
    assert line(()) == ""


def test_spaces_do_not_matter():
    for seed in range(100):
        text = line([any_intervention(seed)])
        wide = text
        for sign in "(),;<>":
            wide = wide.replace(sign, f"  {sign} ")
        assert parse(wide.replace(" at ", "\n at\t"), KNOWN) == parse(text, KNOWN)


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (" add(joy, 1) at 3 \n", "add(joy, 1) at 3"),
        ("add(joy,8.5)at 3", "add(joy, 8.5) at resid_post 3"),
        ("add(joy, 8) at 3-5", "add(joy, 8.0) at resid_post 3,4,5"),
        ("add(joy, -2raw) at 3", "add(joy, -2.0 raw) at 3 on all"),
        ("add(joy, .35dose) at 3", "add(joy, 0.35 dose) at 3 on all"),
        ("add(joy, 1e-3) at 3", "add(joy, +0.001) at 3"),
        ("add(joy, 1) at 3-3", "add(joy, 1) at 3"),
        ("ablate(joy) at mlp_out 0-1 + z 2h3,4h0", "ablate(joy) at mlp_out 0,1 + z 2h3 + z 4h0"),
        ("add(joy, 1) at 3 on positions 4", "add(joy, 1) at 3 on positions 4-4"),
        ("add(joy, 1) at 3 on all + first", "add(joy, 1) at 3 on all+first"),
        ("add(joy, 1) at 3 if cos(sad,2)>.2", "add(joy, 1) at 3 if cos(sad, resid_post 2) > 0.2"),
        ("add(joy, 1) at 1;ablate(sad) at 2", "add(joy, 1) at 1 ; ablate(sad) at 2"),
        (f"add({JOY.label}, 1) at 3", "add(joy, 1) at 3"),
    ],
)
def test_short_and_long_forms_mean_the_same(short, long):
    assert parse(short, KNOWN) == parse(long, KNOWN)


def test_the_canonical_line_names_content_and_joins_ranges():
    many = (
        steer("add", JOY, coefficient="0.35 dose", at="14,15,16", on="generated"),
        steer("ablate", SAD, at="resid_pre 0-1 + attn_out 5 + z 3h1,3h2", on="all+first"),
        steer("rotate", JOY, LAYERED, coefficient="30 deg", at="12,11,10", on="positions 4-9"),
        steer("clamp", FEAR, coefficient=2, at=3, gate=Gate(SAD, Site("resid_pre", 7), False, 0.2)),
    )
    assert line(many) == (
        f"add(joy@{JOY.sha}, 0.35 dose) at resid_post 14-16 on generated; "
        f"ablate(sad@{SAD.sha}) at resid_pre 0-1 + attn_out 5 + z 3h1,3h2 on all+first; "
        f"rotate(joy@{JOY.sha}, caa@{LAYERED.sha}, 30.0 deg) at resid_post 12,11,10 "
        f"on positions 4-9; "
        f"clamp(a+b-c.d_é@{FEAR.sha}, 2.0) at resid_post 3 if cos(sad@{SAD.sha}, resid_pre 7) < 0.2"
    )


def test_an_integer_coefficient_has_the_line_of_the_float():
    whole = Intervention("add", (JOY,), 8, "", (Site("resid_post", 3),))
    assert line([whole]) == line(parse(line([whole]), KNOWN))
    gate = Gate(JOY, Site("resid_post", 1), True, 0)
    assert str(gate).endswith("> 0.0")


def test_a_name_is_what_the_mapping_calls_it():
    (one,) = parse("add(happy, 1) at 3", {"happy": JOY})
    assert one.directions[0] == JOY
    assert line([one]) == f"add(happy@{JOY.sha}, 1.0) at resid_post 3"


def test_a_file_name_keeps_the_directions_own_name():
    (one,) = parse("add(~/dir/x.safetensors, 1) at 3", {"~/dir/x.safetensors": JOY})
    assert line([one]) == f"add(joy@{JOY.sha}, 1.0) at resid_post 3"


@pytest.mark.parametrize("text", ["add(joy@{}, 1) at 3", "add(joy, 1) at 3 if cos(joy@{}, 2) > 0"])
def test_another_content_under_the_same_name_is_refused(text):
    assert parse(text.format(JOY.sha), KNOWN)
    with pytest.raises(RequestError, match=rf"joy@{SAD.sha} is asked for.*at hand is {JOY.label}"):
        parse(text.format(SAD.sha), KNOWN)


def test_an_unknown_name_is_refused_with_its_neighbours():
    with pytest.raises(RequestError, match=r"unknown direction 'jo' in 'add\(jo, .*nearest: joy"):
        parse("add(jo, 1) at 3", KNOWN)


# --- errors say where and what ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # ¦ stands before the column that the error names
        ("¦adds(joy, 1) at 3", "an operator, nearest: add"),
        ("¦;add(joy, 1) at 3", "an operator such as 'add'"),
        ("add(joy, 1) at 3;¦", "an operator such as 'add'"),
        ("add(joy, 1) at 3; ¦cut(joy) at 3", "an operator"),
        ("add ¦joy, 1) at 3", "'('"),
        ("add(¦, 1) at 3", "the name of a direction"),
        ("rotate(joy¦) at 3", "',' and a second direction"),
        ("add(joy¦) at 3", "',' and a coefficient"),
        ("add(joy, ¦x) at 3", "a number"),
        ("add(joy, ¦) at 3", "a number"),
        ("add(joy, 3 deg¦) at 3", "the unit dose or max or raw before ')'"),
        ("rotate(joy, sad, 30¦) at 3", "the unit deg before ')'"),
        ("rotate(joy, sad, 30 ¦degrees) at 3", "the unit deg, nearest: deg"),
        ("ablate(joy¦, 3) at 3", "')'"),
        ("add(joy, 3 ¦at 3", "')'"),
        ("add(joy, 3 ¦doses) at 3", "the unit dose or max or raw, nearest: dose"),
        ("add(joy, 3 ¦furlongs) at 3", "the unit dose or max or raw"),
        ("add(joy, 3) ¦3", "'at' and a site"),
        ("add(joy, 3)¦", "'at' and a site"),
        ("add(joy, 3) at¦", "a layer"),
        ("add(joy, 3) at ¦-3", "a layer"),
        ("add(joy, 3) at ¦resid 3", "a layer or a component, nearest: resid_pre"),
        ("add(joy, 3) at mlp_out¦", "a layer"),
        ("add(joy, 3) at 3,¦", "a layer"),
        ("add(joy, 3) at 3-¦", "a layer"),
        ("add(joy, 3) at z 3h¦", "a head"),
        ("add(joy, 3) at 3 +¦", "a layer"),
        ("add(joy, 3) at 3 ¦at 4", "the end"),
        ("add(joy, 3) at 3¦.5", "the end"),
        ("add(joy, 3) at 3 on¦", "a scope: all, prompt, generated, last, content, positions"),
        ("add(joy, 3) at 3 on ¦everything", "a scope, choices: all, prompt"),
        ("add(joy, 3) at 3 on ¦promt", "a scope, nearest: prompt"),
        ("add(joy, 3) at 3 on positions¦", "a position"),
        ("add(joy, 3) at 3 on positions 4-¦", "a position"),
        ("add(joy, 3) at 3 on all¦+last", "the end"),
        ("add(joy, 3) at 3 on all ¦on last", "the end"),
        ("add(joy, 3) at 3 if¦", "'cos(direction, site)'"),
        ("add(joy, 3) at 3 if cos ¦joy", "'('"),
        ("add(joy, 3) at 3 if cos(joy¦) > 1", "',' and a site"),
        ("add(joy, 3) at 3 if cos(joy, 3-4¦) > 1", "one layer"),
        ("add(joy, 3) at 3 if cos(joy, 3) ¦= 1", "'>' or '<'"),
        ("add(joy, 3) at 3 if cos(joy, 3) > ¦x", "a threshold"),
        ("add(joy, 3) at 3 if cos(joy, 3) > 1 ¦on all", "the end"),
    ],
)
def test_errors_name_the_column_and_what_was_expected(text, expected):
    column = text.index("¦") + 1
    text = text.replace("¦", "")
    with pytest.raises(RequestError) as caught:
        parse(text, KNOWN)
    said = str(caught.value)
    assert said.startswith(f"cannot read {text!r} at column {column}: expected {expected}"), said
    rest = text[column - 1 :]
    assert said.endswith(f"found {rest[:12]!r}" if rest else "the text ends")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("add(joy, nan) at 3", "the coefficient of add is nan, not a number"),
        ("add(joy, -inf dose) at 3", "the coefficient of add is -inf"),
        ("add(joy, 1e999) at 3", "the coefficient of add is inf"),
        ("add(joy, -1e16) at 3", r"the coefficient of add is -1e\+16; beyond 1e\+15"),
        ("add(joy, 1) at 5-3", "layers 5-3 are not a range"),
        ("add(joy, 1) at 3,3", "add needs sites, each once"),
        ("add(joy, 1) at 2-4,3", "add needs sites, each once"),
        ("add(joy, 1) at z 3", "a site at z names a head"),
        ("add(joy, 1) at 3h1", "a site at z names a head"),
        ("add(joy, 1) at 3 on positions 9-4", "positions 9-4 are not a range"),
        ("add(joy, 1) at 3 if cos(joy, mlp_out 3) > 0", "a gate reads resid_pre or resid_post"),
        ("add(joy, 1) at 3 if cos(joy, 3) > nan", "the threshold of a gate is nan"),
    ],
)
def test_what_reads_well_but_means_nothing_is_refused(text, said):
    with pytest.raises(RequestError, match=said):
        parse(text, KNOWN)


# --- values -----------------------------------------------------------------------------------


HERE = (Site("resid_post", 3),)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (("cut", (JOY,), 1.0, "", HERE), "unknown operator 'cut'"),
        (("add", (JOY, SAD), 1.0, "", HERE), "add takes 1 direction, got 2"),
        (("rotate", (JOY,), 1.0, "deg", HERE), "rotate takes 2 directions, got 1"),
        (("add", (JOY,), math.nan, "", HERE), "is nan"),
        (("add", (JOY,), 1.0, "deg", HERE), "unit none or dose or max or raw"),
        (("rotate", (JOY, SAD), 1.0, "", HERE), "unit deg"),
        (("ablate", (JOY,), 5.0, "", HERE), "ablate takes no coefficient"),
        (("ablate", (JOY,), 0.0, "dose", HERE), "ablate takes no coefficient"),
        (("add", (JOY,), 1.0, "", ()), "needs sites"),
        (("add", (JOY,), 1.0, "", HERE * 2), "each once"),
    ],
)
def test_values_that_no_line_can_say_are_refused(parts, said):
    with pytest.raises(RequestError, match=said):
        Intervention(*parts)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (("some",), "unknown scope 'some'"),
        (("positions", 4, 2), "not a range"),
        (("positions", -1, 2), "not a range"),
        (("all", 0, 5), "scope 'all' takes no begin and end"),
    ],
)
def test_scopes_that_mean_nothing_are_refused(parts, said):
    with pytest.raises(RequestError, match=said):
        Scope(*parts)


def test_steer_takes_layers_texts_and_sites():
    wanted = parse("add(joy, 0.5 dose) at 3-4 on last", KNOWN)[0]
    sites = (Site("resid_post", 3), Site("resid_post", 4))
    for at in ("3-4", "resid_post 3,4", sites, list(sites)):
        assert steer("add", JOY, coefficient="0.5 dose", at=at, on="last") == wanted
    assert steer("add", JOY, coefficient=2, at=3) == parse("add(joy, 2) at 3", KNOWN)[0]
    assert steer("add", JOY, coefficient=1e-9, at=3).value == 1e-9
    assert steer("ablate", JOY, at=3) == parse("ablate(joy) at 3", KNOWN)[0]
    gate = Gate(SAD, Site("resid_post", 1), True, 0.5)
    wanted = parse("angular(joy, caa, -45 deg) at z 3h1 if cos(sad, 1) > 0.5", KNOWN)[0]
    assert steer("angular", JOY, LAYERED, coefficient="-45 deg", at="z 3h1", gate=gate) == wanted


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"coefficient": "much"}, "column 1: expected a number, found 'much'"),
        ({"coefficient": "3 apples"}, "column 3: expected the unit"),
        ({"coefficient": "30 deg"}, "add takes a coefficient with unit"),
        ({"coefficient": math.nan}, "is nan"),
        ({"at": "fifteen"}, "column 1: expected a layer or a component"),
        ({"at": -1}, "expected a layer"),
        ({"at": ()}, "needs sites"),
        ({"on": "every"}, "expected a scope"),
        ({"on": "last, all"}, "expected the end"),
    ],
)
def test_steer_says_what_it_cannot_read(changes, said):
    given = {"coefficient": 1.0, "at": 3, "on": "all", **changes}
    with pytest.raises(RequestError, match=said):
        steer("add", JOY, **given)


def test_a_set_gives_each_layer_its_own_and_a_direction_itself():
    one = steer("rotate", LAYERED, JOY, coefficient="1 deg", at="3 + mlp_out 5")
    assert one.at(Site("resid_post", 3)) == (LAYERED[3], JOY)
    assert one.at(Site("mlp_out", 5)) == (LAYERED[5], JOY)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("add(wide, 1) at 0-5", None),
        ("add(wide, 1) at 6", "layer 6 is out of range"),
        ("add(narrow, 1) at 2", "the direction is 8 wide; .* is 64 wide"),
        ("add(head, 1) at z 2h3", None),
        ("add(head, 1) at z 2h4", "head 4 is out of range: .* heads 0-3"),
        ("add(wide, 1) at z 2h1", "64 wide; .* is 24 wide"),
        ("add(wide, 1) at 2 if cos(wide, 5) > 0", None),
        ("add(wide, 1) at 2 if cos(wide, 6) > 0", "layer 6 is out of range"),
        ("add(wide, 1) at 2 if cos(narrow, 3) > 0", "8 wide"),
        ("add(set, 1) at 2-3", "set has no direction for layer 3"),
    ],
)
def test_check_compares_with_the_model(tiny, text, said):
    known = {
        "wide": one_way(1, "wide", width=64),
        "narrow": one_way(1, "narrow"),
        "head": one_way(1, "head", width=24),
        "set": DirectionSet([one_way(1, "set", 2, width=64)]),
    }
    (one,) = parse(text, known)
    if said is None:
        one.check(tiny)
    else:
        with pytest.raises(RequestError, match=said):
            one.check(tiny)


# --- scope ------------------------------------------------------------------------------------


def steered(scope: Scope, content: list[bool], upto: int = 8) -> set[int]:
    begin, end = scope.after_prompt(len(content))
    inside = {i for i, chosen in enumerate(scope.prompt_mask(content)) if chosen}
    return inside | {p for p in range(len(content), upto) if begin <= p < end}


BOS_USER_USER_END = [False, False, True, True, False]


@pytest.mark.parametrize(
    ("text", "positions"),
    [  # a prompt of five tokens; positions 5 to 7 are generated
        ("all", {1, 2, 3, 4, 5, 6, 7}),
        ("all+first", {0, 1, 2, 3, 4, 5, 6, 7}),
        ("prompt", {1, 2, 3, 4}),
        ("prompt+first", {0, 1, 2, 3, 4}),
        ("generated", {4, 5, 6, 7}),
        ("generated+first", {4, 5, 6, 7}),
        ("last", {4}),
        ("last+first", {4}),
        ("content", {2, 3, 5, 6, 7}),
        ("content+first", {2, 3, 5, 6, 7}),
        ("positions 0-2", {0, 1, 2}),
        ("positions 0", {0}),
        ("positions 1-2", {1, 2}),
        ("positions 1-2+first", {1, 2}),
        ("positions 3-5", {3, 4, 5}),
        ("positions 6", {6}),
        ("positions 2-99", {2, 3, 4, 5, 6, 7}),
    ],
)
def test_which_positions_a_scope_steers(text, positions):
    scope = steer("ablate", JOY, at=3, on=text).scope
    assert steered(scope, BOS_USER_USER_END) == positions


@pytest.mark.parametrize(
    ("text", "positions"),
    [  # a prompt of one token, which is content
        ("all", {1, 2}),
        ("all+first", {0, 1, 2}),
        ("prompt", set()),
        ("prompt+first", {0}),
        ("generated", {1, 2}),
        ("generated+first", {0, 1, 2}),
        ("last", set()),
        ("last+first", {0}),
        ("content", {1, 2}),
        ("content+first", {0, 1, 2}),
        ("positions 0-1", {0, 1}),
    ],
)
def test_the_first_position_is_steered_only_if_asked(text, positions):
    scope = steer("ablate", JOY, at=3, on=text).scope
    assert steered(scope, [True], upto=3) == positions


# --- coefficients -----------------------------------------------------------------------------


SCALE = Scale((1.0, 2.0, 4.0, 4.0, 8.0))  # before block 0, after blocks 0 to 3


def test_a_number_is_a_length_everywhere():
    one = steer("add", JOY, coefficient=3, at="0-1 + z 2h1")
    assert one.lengths() == (3.0, 3.0, 3.0)
    assert one.resolve() == one.resolve(SCALE) == (one,)


def test_a_dose_is_a_share_of_the_median_length_at_each_site():
    one = steer("add", JOY, coefficient="0.5 dose", at="resid_pre 0 + 0-3 + attn_out 3", on="last")
    assert one.lengths(SCALE) == (0.5, 1.0, 2.0, 2.0, 4.0, 4.0)
    resolved = one.resolve(SCALE)
    assert line(resolved) == "; ".join(
        f"add({JOY.label}, {length}) at {sites} on last"
        for length, sites in [
            (0.5, "resid_pre 0"),
            (1.0, "resid_post 0"),
            (2.0, "resid_post 1-2"),
            (4.0, "resid_post 3 + attn_out 3"),
        ]
    )


def test_a_dose_needs_a_scale_and_the_residual_stream():
    one = steer("add", JOY, coefficient="0.5 dose", at=1)
    for ask in (one.lengths, one.resolve, one.strengths):
        with pytest.raises(RequestError, match=r"has a dose: call \.resolve\(Scale\.of"):
            ask()
    with pytest.raises(RequestError, match="at z give a number"):
        steer("add", JOY, coefficient="0.5 dose", at="z 1h1").resolve(SCALE)


def test_max_is_a_multiple_of_the_features_largest_activation():
    assert steer("clamp", SAD, coefficient="1.5 max", at="1-2").lengths() == (6.0, 6.0)
    layered = steer("add", LAYERED, coefficient="-2 max", at="3,0")
    assert layered.lengths() == (-8.0, -2.0)
    assert [(one.value, one.unit, one.sites) for one in layered.resolve()] == [
        (-8.0, "", (Site("resid_post", 3),)),
        (-2.0, "", (Site("resid_post", 0),)),
    ]
    with pytest.raises(RequestError, match=f"{JOY.label} has no maximum activation"):
        steer("add", JOY, coefficient="2 max", at=1).resolve(SCALE)


def test_an_angle_has_no_length():
    one = steer("rotate", JOY, SAD, coefficient="30 deg", at="0-1")
    assert one.lengths() == (None, None)
    assert one.resolve() == (one,)


def test_resolving_keeps_scope_and_gate():
    gate = Gate(SAD, Site("resid_post", 1), True, 0.5)
    one = steer("clamp_min", SAD, coefficient="1 max", at="0-1", on="positions 2-4", gate=gate)
    (resolved,) = one.resolve()
    assert resolved == steer(
        "clamp_min", SAD, coefficient=4, at="0-1", on="positions 2-4", gate=gate
    )


def test_raw_is_a_multiple_of_each_directions_own_length():
    """CAA adds c (mean difference): with `c raw` the step is the difference itself, c times."""
    vectors = {layer: 3.0 * layer * JOY.unit for layer in (10, 11, 12)}
    several = DirectionSet(
        Direction.of(v, f"blocks.{layer}.hook_resid_post", "caa") for layer, v in vectors.items()
    )
    one = steer("add", several, coefficient="-2 raw", at="10-12")
    assert str(one) == f"add(caa@{several.sha}, -2.0 raw) at resid_post 10-12"
    assert parse(str(one), {"caa": several}) == (one,)
    parts = one.resolve()  # needs no scale
    assert [(part.value, part.unit) for part in parts] == [(-60.0, ""), (-66.0, ""), (-72.0, "")]
    for part in parts:
        layer = part.sites[0].layer
        step = part.value * part.at(part.sites[0])[0].unit
        assert torch.allclose(step, -2 * vectors[layer], rtol=1e-6)
    # one direction goes to every site as it is, at its own length
    same = steer("add", several[10], coefficient="0.5 raw", at="3 + resid_pre 1")
    assert same.lengths() == pytest.approx((15.0, 15.0), rel=1e-6)
    for operator in ("add_norm_kept", "clamp", "clamp_min", "clamp_max"):
        assert steer(operator, several, coefficient="1 raw", at=11).resolve()[0].value == 33.0
    with pytest.raises(RequestError, match="a coefficient with unit none or max"):
        steer("latent_clamp", JOY, coefficient="1 raw", at=3)


def test_a_dose_beyond_the_last_layer_is_one_line():
    one = steer("add", JOY, coefficient="0.5 dose", at=99)
    with pytest.raises(RequestError, match=r"layer 99 is out of range: the model has layers 0-\d"):
        one.resolve(SCALE)


def test_strengths_shows_every_form_at_every_site():
    one = steer("add", SAD, coefficient="0.5 dose", at="0 + mlp_out 3")
    assert one.strengths(SCALE) == [
        {"site": "resid_post 0", "coefficient": 1.0, "dose": 0.5, "max": 0.25},
        {"site": "mlp_out 3", "coefficient": 4.0, "dose": 0.5, "max": 1.0},
    ]
    assert steer("add", JOY, coefficient=3, at="z 0h1").strengths(SCALE) == [
        {"site": "z 0h1", "coefficient": 3.0, "dose": None, "max": None}
    ]
    assert steer("add", LAYERED, coefficient="2 max", at=1).strengths() == [
        {"site": "resid_post 1", "coefficient": 4.0, "dose": None, "max": 2.0}
    ]
    assert steer("rotate", SAD, JOY, coefficient="30 deg", at=0).strengths(SCALE) == [
        {"site": "resid_post 0", "coefficient": 30.0, "dose": None, "max": None}
    ]


@pytest.mark.parametrize("operator", CLAMPS)
def test_clamping_operators_have_lengths(operator):
    given = {} if operator == "ablate" else {"coefficient": 2}
    assert steer(operator, JOY, at=1, **given).lengths() == (2.0 if given else 0.0,)


def test_several_layers_may_be_numbers():
    assert steer("add", JOY, coefficient=1, at=[3, 5]).sites == (
        Site("resid_post", 3),
        Site("resid_post", 5),
    )


def test_a_range_that_no_model_has_is_refused():
    with pytest.raises(RequestError, match="more than any model has"):
        parse("add(joy, 1) at 0-99999999", {"joy": JOY})


def test_an_unknown_name_says_where():
    with pytest.raises(RequestError, match="column 25"):
        parse("add(joy, 1) at 3; add(  jy, 1) at 3", {"joy": JOY})
