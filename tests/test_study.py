"""What a study declares: cells, controls, and the mistakes that are told before anything runs."""

import pytest
import torch

from interp_steer.cell import Controls
from interp_steer.contrast import Contrast
from interp_steer.direction import Direction
from interp_steer.errors import RequestError
from interp_steer.intervention import line
from interp_steer.item import Item
from interp_steer.scale import Scale
from interp_steer.stages import controlled
from interp_steer.study import Study, split_items
from interp_steer.study_file import StudyFile, write

SCALE = Scale(tuple(float(10 + i) for i in range(7)))


def direction(seed=0, layer=2, name="d"):
    vector = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    return Direction.of(vector, f"blocks.{layer}.hook_resid_post", name)


def study(**changes):
    given = {
        "choose": ["The quick brown fox", "I love"],
        "prove": ["What is", "Name three"],
        "directions": {"d": direction()},
        "sites": "each 1-2",
        "coefficients": [1, "0.5 dose"],
        "metrics": "length",
    }
    return Study(**{**given, **changes})


def test_the_grid_is_the_product_in_order():
    made = study(operators=["add", "ablate"], scopes=["all", "prompt"])
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
    cells = study().grid(SCALE)
    assert [cell.steer[0].value for cell in cells] == [1.0, 6.0, 1.0, 6.5]
    together = study(sites=["1-2"]).grid(SCALE)
    assert [one.value for one in together[1].steer] == [6.0, 6.5]


def test_lines_are_cells_of_their_own():
    made = study(lines=["add(d, 2) at 1; clamp(d, 0.5 dose) at 2"], sites=(), coefficients=())
    (cell,) = made.grid(SCALE)
    own = direction().label
    assert line(cell.steer) == (  # half of the stream's median length after block 2
        f"add({own}, 2.0) at resid_post 1; clamp({own}, 6.5) at resid_post 2"
    )
    (null,) = (made.cell(made.settings[0], SCALE, "random", made.null_vectors(4), 4),)
    assert {one.directions[0].name for one in null.steer} == {"d-random4"}


def test_controls_of_a_contrastive_direction():
    g = torch.Generator().manual_seed(1)
    contrast = Contrast(torch.randn(6, 4, 64, generator=g), torch.randn(6, 4, 64, generator=g))
    made = study(directions={"d": contrast}, controls=Controls(random=3, shuffled=2))
    cells = controlled(made, ("d", "add", "resid_post 1", "0.5 dose", "all"), SCALE, 6)
    assert [c.role for c in cells] == [
        "chosen", "flip", "wrong_layer", *["random"] * 3, *["shuffled"] * 2,
    ]  # fmt: skip
    own = cells[0].steer[0]
    assert cells[1].steer[0].value == -own.value
    assert cells[1].steer[0].directions == own.directions
    wrong = cells[2].steer[0]
    assert wrong.sites[0].layer == 4 and wrong.value == 0.5 * 15.0  # the same dose, there
    assert torch.equal(wrong.directions[0].unit, own.directions[0][1].unit)  # layer 1's own vector
    vectors = [c.steer[0].directions[0][1] for c in cells[3:]]
    assert all(c.steer[0].value == own.value for c in cells[3:])
    assert len({v.sha for v in vectors}) == 5
    for vector in vectors[:3]:
        assert vector.norm == own.directions[0][1].norm
    expected = contrast.shuffled(1).directions()[1].unit
    assert torch.equal(vectors[4].unit, expected)


def test_matched_features_are_alike(starter):
    from interp_steer.features import feature
    from interp_steer.matched import matched_features

    own = feature("starter", 2652, name="paris")
    found = matched_features(own, 20)
    assert len({d.source["index"] for d in found} - {"2652"}) == 20
    from interp_steer.sae import Sae

    rows = Sae.of(own).rows(torch.tensor([int(d.source["index"]) for d in found]))
    for one, row in zip(found, rows, strict=True):
        assert torch.allclose(one.vector, row, atol=1e-6)
        density = float(one.source["density"])
        assert one.name.startswith("paris-like") and 0.005 < density < 0.05  # 2652's is 0.015
    with pytest.raises(RequestError, match="no feature of an SAE"):
        matched_features(direction(), 3)


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
        ({"coefficients": ["0.5 doze"]}, "expected the end, found 'doze'"),
        ({"coefficients": [1, 1.0]}, "coefficients hold '1.0' twice"),
        ({"scopes": ["promt"]}, "expected a scope: all, prompt"),
        ({"seeds": [0.5]}, "whole numbers"),
        ({"prove": []}, "no prompts to prove"),
        ({"prove": "text"}, "expected a list"),
        ({"prove": ["I love", "c"]}, "both choose and prove"),
        ({"build": ["What is"]}, "both build and prove"),
        ({"prove": ["a", "a"]}, "prove holds 'a' twice"),
        ({"directions": {}}, "no directions"),
        ({"directions": {"d": "file"}}, "expected a Direction"),
        ({"controls": Controls}, "controls"),
        ({"chunk": 0}, "at least 1"),
        ({"lines": ["add(e, 1) at 1"], "sites": ()}, "unknown direction 'e'"),
    ],
)
def test_mistakes_are_told_in_one_line(changes, said):
    if changes.get("controls") is Controls:
        with pytest.raises(RequestError, match="random is -1, expected 0"):
            Controls(random=-1)
        return
    with pytest.raises(RequestError, match=said) as caught:
        study(**changes).grid(SCALE)
    assert "\n" not in str(caught.value)


def test_split_is_fixed_and_whole():
    items = [f"p{i}" for i in range(11)]
    choose, prove = split_items(items)
    assert sorted([*choose, *prove]) == sorted(items) and len(choose) == 6
    assert split_items(items) == (choose, prove) != split_items(items, seed=17)
    with pytest.raises(RequestError, match="cannot be split"):
        split_items(["one"])


def test_a_written_study_reads_back(tiny, tmp_path):
    g = torch.Generator().manual_seed(1)
    contrast = Contrast(
        torch.randn(6, 4, 64, generator=g), torch.randn(6, 4, 64, generator=g), {"model": "m"}
    )
    made = study(
        directions={"d": direction(), "c": contrast},
        prove=[Item("What is", positive=" a", negative=" b"), (("user", "hi"),)],
        neutral=["one two three four"],
        limits={"length": 1.0},
        lines=["add(d, 2.0) at 1"],
        controls=Controls(random=3),
        seeds=[0, 1],
        system="Be brief.",
        question="Why: is it? # no comment",
    ).bound(tiny)
    (tmp_path / "directions").mkdir()
    path = write(made, tiny, tmp_path)
    back = StudyFile.read(path).study(tiny)
    assert back.settings == made.settings
    assert list(back.items()) == list(made.items())
    assert list(back.bound(tiny).items()) == list(made.items())  # chats already
    assert back.directions["d"] == made.directions["d"]
    assert torch.equal(back.directions["c"].positive, contrast.positive)
    for name in (
        "controls",
        "sampling",
        "limits",
        "seeds",
        "metrics",
        "question",
        "chunk",
        "lines",
    ):
        assert getattr(back, name) == getattr(made, name), name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("directons: {d: d.safetensors}", "unknown field 'directons'; nearest: directions"),
        ("- a\n- b", "holds no study"),
        ("a: [", "is not YAML"),
        ("directions: {d: x}\nprompts: {chose: [a]}", "unknown part of the prompts 'chose'"),
        ("directions: {d: x}\nprompts: {choose: gone.txt}", "no prompt file gone.txt"),
        ("directions: {d: x}\nprompts: {all: [a]}", "cannot be split"),
        ("directions: {d: x}\nprompts: {all: [a, b], prove: [c]}", "give `all`, or"),
        ("directions: {d: {positiv: [a]}}\nprompts: {prove: [b]}", "nearest: positive"),
        ("directions: {d: {positive: [a]}}\nprompts: {prove: [b]}", "expected positive and"),
        ("directions: {d: 7}\nprompts: {prove: [b]}", "expected a file"),
        ("directions: {3 4: x}\nprompts: {prove: [b]}", "cannot name a direction"),
        ("directions: {d: x}\nprompts: {prove: [b]}\ncontrols: {randm: 3}", "nearest: random"),
        ("directions: {d: x}\nprompts: {prove: [b]}\nsampling: {top: 3}", "sampling setting"),
        ("directions: {d: x}\nprompts: {prove: []}", "expected a file or a list"),
        ("directions: {d: x}", "has no prompts"),
    ],
)
def test_a_file_with_a_mistake_is_told_before_a_model_loads(tmp_path, text, said):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=said) as caught:
        StudyFile.read(path)
    assert "\n" not in str(caught.value)


def test_a_direction_that_is_nowhere_is_told(tiny, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("directions: {d: gone}\nprompts: {prove: [b]}\nsites: 1\ncoefficients: 1\n")
    with pytest.raises(RequestError, match="'gone' is no file and no stored direction"):
        StudyFile.read(path).study(tiny)
