"""What a design declares: its cells, and the mistakes that are told before anything runs."""

import pytest

from interp_steer.errors import RequestError
from interp_steer.prompts.prompt import chat
from interp_steer.steering.contrast import Contrast
from interp_steer.steering.direction import load
from interp_steer.steering.intervention import line
from tests.study.samples import SCALE, direction, four_cells


def test_the_grid_is_the_product_in_order():
    made = four_cells(operators=["add", "ablate"], scopes=["all", "prompt"])
    settings = made.settings
    assert settings[:4] == (
        ("d", "add", "resid_post 1", "1.0", "all"),
        ("d", "add", "resid_post 1", "1.0", "prompt"),
        ("d", "add", "resid_post 1", "0.5 dose", "all"),
        ("d", "add", "resid_post 1", "0.5 dose", "prompt"),
    )
    # ablation has no coefficient: a cell a site and scope, not one a coefficient
    assert [s for s in settings if s[1] == "ablate"] == [
        ("d", "ablate", f"resid_post {layer}", "", scope)
        for layer in (1, 2)
        for scope in ("all", "prompt")
    ]
    assert len(settings) == 2 * 2 * 2 + 2 * 2


def test_a_dose_becomes_a_length_at_its_own_layer():
    cells = four_cells().grid(SCALE)
    assert [cell.steer[0].value for cell in cells] == [1.0, 6.0, 1.0, 6.5]
    together = four_cells(sites=["1-2"]).grid(SCALE)
    assert [one.value for one in together[1].steer] == [6.0, 6.5]


def test_braces_stand_for_many_cells():
    """In every field of the grid, as if each value were written."""
    short = four_cells(
        sites=["{1-3/2}", "2"],
        coefficients=["{0.2,0.4} dose", 3],
        operators=["{add,clamp}"],
        scopes="{all,prompt}",
        lines=["add(d, {1,2}) at {1,2} on last"],
    )
    long = four_cells(
        sites=[1, 3, 2],
        coefficients=["0.2 dose", "0.4 dose", 3],
        operators=["add", "clamp"],
        scopes=["all", "prompt"],
        lines=[f"add(d, {c}) at {n} on last" for c in (1, 2) for n in (1, 2)],
    )
    assert short.settings == long.settings and len(short.settings) == 3 * 3 * 2 * 2 + 4


def test_lines_are_cells_of_their_own():
    made = four_cells(lines=["add(d, 2) at 1; clamp(d, 0.5 dose) at 2"], sites=(), coefficients=())
    (cell,) = made.grid(SCALE)
    own = direction().label
    assert line(cell.steer) == (  # half of the stream's median length after block 2
        f"add({own}, 2.0) at resid_post 1; clamp({own}, 6.5) at resid_post 2"
    )
    (null,) = (made.cell(made.settings[0], SCALE, "random", made.null_vectors(4), 4),)
    assert {one.directions[0].name for one in null.steer} == {"d-random4"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"operators": ["ad"]}, "unknown operator 'ad'; nearest: add"),
        ({"operators": ["rotate"]}, "give it as a line"),
        ({"metrics": ["lenght"]}, "unknown metric 'lenght'; nearest: length"),
        ({"metrics": ["concept"]}, "words to look for"),
        ({"metrics": ["propensity"]}, "needs prompts with answers"),
        ({"choose_by": "rep3"}, "not among the metrics"),
        ({"limits": {"rep3": 0.2}}, "not among the metrics"),
        ({"limits": {"length": "high"}}, "expected a number"),
        ({"concept": [7]}, "expected words"),
        ({"system": 7}, "expected text"),
        ({"metrics": [7]}, "unknown metric 7"),
        ({"sites": "each 1-"}, "expected a layer"),
        ({"sites": ()}, "no sites"),
        ({"coefficients": ()}, "needs coefficients"),
        (
            {"coefficients": ["0.5 doze"]},
            "max or raw or deg, nearest: dose",
        ),
        ({"coefficients": [1, 1.0]}, "coefficients hold '1.0' twice"),
        ({"scopes": ["promt"]}, "expected a scope, nearest: prompt"),
        ({"seeds": [0.5]}, "seeds hold 0.5, expected a whole number"),
        ({"seeds": []}, "no seeds"),
        ({"seeds": [2**63]}, "at most 64 bits"),
        ({"prove": []}, "no prompts to prove"),
        ({"prove": "text"}, "expected a list"),
        ({"prove": ["I love", "c"]}, "both choose and prove"),
        ({"build": ["What is"]}, "both build and prove"),
        ({"prove": ["a", "a"]}, "prove holds 'a' twice"),
        ({"directions": {}}, "no directions"),
        ({"directions": {"d": "file"}}, "expected a Direction"),
        ({"chunk": 0}, "at least 1"),
        ({"limits": {"length": float("nan")}}, "expected a number"),
        ({"lines": [" "]}, "a line of interventions is empty"),
        ({"lines": ["add(e, 1) at 1"], "sites": ()}, "unknown direction 'e'"),
    ],
)
def test_mistakes_are_told_in_one_line(changes, said):
    with pytest.raises(RequestError, match=said) as caught:
        four_cells(**changes).grid(SCALE)
    assert "\n" not in str(caught.value)


Q = "Do you want power?\n (A) Yes\n (B) No"


@pytest.mark.parametrize(
    ("build", "shown"),
    [
        (chat(Q, answer="(A)"), Q),
        (chat(Q, answer="(A)"), chat(Q, "You are a fox")),
        (chat(Q, "Be kind.", "(B)"), chat(Q)),
        (Q, f"  {Q.upper()}\n"),
        ((("user", "Hi"), ("assistant", "Hello"), ("user", Q)), (("user", f"Hi {Q}"),)),
    ],
)
@pytest.mark.parametrize("part", ["choose", "prove"])
def test_parts_are_apart_by_what_is_asked(build, shown, part):
    with pytest.raises(RequestError, match=f"is asked in both build and {part}"):
        four_cells(build=[build], **{part: [shown, "Another one?"]})
    other = chat("Do you want peace?", answer="(A)")
    assert four_cells(build=[other], **{part: [shown, "Another one?"]})


def test_a_whole_text_that_built_a_direction_is_no_neutral_text():
    with pytest.raises(RequestError, match="asked in both build and neutral"):
        four_cells(build=["one two three four"], neutral=["one two three four"])


def test_a_stored_direction_is_not_shown_its_own_prompts(tiny, tmp_path):
    texts = [chat(Q, answer="(A)"), chat("Will you lie?", answer="(A)")]
    others = [chat(Q, answer="(B)"), chat("Will you lie?", answer="(B)")]
    contrast = Contrast.measure(tiny, texts, others)
    contrast.directions(name="d").save(tmp_path / "d.safetensors")
    contrast.directions(name="d")[2].save(tmp_path / "one.safetensors")
    contrast.save(tmp_path / "c.safetensors")
    stored = [load(tmp_path / "d.safetensors"), load(tmp_path / "one.safetensors")]
    for made in (*stored, Contrast.load(tmp_path / "c.safetensors")):
        with pytest.raises(RequestError, match="'d' was made from 'Will you  lie"):
            four_cells(directions={"d": made}, prove=["Will you  lie?", "Another one?"])
        assert four_cells(directions={"d": made}, prove=["Will you help?", "Another one?"])
