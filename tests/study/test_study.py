"""What a study declares: cells, controls, and the mistakes that are told before anything runs."""

import re
from dataclasses import replace

import pytest
import torch

from interp_steer.engine.row import Sampling
from interp_steer.errors import RequestError, RunError
from interp_steer.prompts.item import Item
from interp_steer.prompts.parts import split_items
from interp_steer.prompts.prompt import chat
from interp_steer.steering.contrast import Contrast
from interp_steer.steering.direction import Direction, load
from interp_steer.steering.intervention import line
from interp_steer.steering.scale import Scale
from interp_steer.study.cell import Controls
from interp_steer.study.description import write
from interp_steer.study.file import StudyFile
from interp_steer.study.plan import Plan
from interp_steer.study.stages import controlled
from interp_steer.study.study import Study

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
    from interp_steer.features.feature import feature
    from interp_steer.features.matched import matched_features

    own = feature("starter", 2652, name="paris")
    found = matched_features(own, 20)
    assert len({d.source["index"] for d in found} - {"2652"}) == 20
    from interp_steer.features.sae import Sae

    rows = Sae.of(own).rows(torch.tensor([int(d.source["index"]) for d in found]))
    for one, row in zip(found, rows, strict=True):
        assert torch.allclose(one.vector, row, atol=1e-6)
        density = float(one.source["density"])
        assert one.name.startswith("paris-like") and 0.005 < density < 0.05  # 2652's is 0.015
    with pytest.raises(RequestError, match="no feature of an SAE"):
        matched_features(direction(), 3)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"neuronpedia": "llama3.1-8b/15-llamascope-res-32k/5"},
         "run `interp-steer labels sync llama3.1-8b/15-llamascope-res-32k --numbers`, or set"),
        ({}, "its SAE has no labels on Neuronpedia: set controls"),
    ],
)  # fmt: skip
def test_how_features_could_be_matched_is_told(tmp_path, monkeypatch, source, said):
    from interp_steer.features.matched import matched_features

    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path))
    source = {"release": "llama_scope_lxr_8x", "sae_id": "l15r_8x", "index": "5", **source}
    with pytest.raises(RequestError, match=re.escape(said)):
        matched_features(replace(direction(), source=source), 3)


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
        ({"controls": Controls}, "controls"),
        ({"chunk": 0}, "at least 1"),
        ({"limits": {"length": float("nan")}}, "expected a number"),
        ({"lines": [" "]}, "a line of interventions is empty"),
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


def test_true_is_no_number():
    for field in ("temperature", "top_k"):
        with pytest.raises(RequestError, match=f"^{field} is True, expected a (whole )?number"):
            Sampling(**{field: True})


def test_split_is_fixed_and_whole():
    items = [f"p{i}" for i in range(11)]
    choose, prove = split_items(items)
    assert sorted([*choose, *prove]) == sorted(items) and len(choose) == 6
    assert split_items(items) == (choose, prove) != split_items(items, seed=17)
    with pytest.raises(RequestError, match="cannot be split"):
        split_items(["one"])


def test_raw_coefficients_are_caas_own_and_the_controls_are_as_long():
    g = torch.Generator().manual_seed(3)
    positive, negative = torch.randn(6, 5, 64, generator=g) + 1, torch.randn(6, 5, 64, generator=g)
    made = study(
        directions={"caa": Contrast(positive, negative, {})},
        sites="each 1-3",
        coefficients=["-2 raw", "1 raw"],
        controls=Controls(random=1, features=0, shuffled=2),
    )
    lengths = (positive.mean(1) - negative.mean(1)).norm(dim=-1)
    wanted = [c * lengths[layer].item() for layer in (1, 2, 3) for c in (-2, 1)]
    assert [cell.steer[0].value for cell in made.grid(SCALE)] == pytest.approx(wanted, rel=1e-5)
    assert [s[3] for s in made.settings[:2]] == ["-2.0 raw", "1.0 raw"]
    cells = controlled(made, made.settings[0], SCALE, n_layers=6)
    values = {}
    for cell in cells:
        values.setdefault(cell.role, set()).add(cell.steer[0].value)
    own = made.grid(SCALE)[0].steer[0].value
    # shuffled differences are shorter: a multiple of their own length would be no control
    shuffled = made.shuffled({"caa": made.directions["caa"]}, 0)["caa"]
    assert shuffled[1].norm < 0.9 * lengths[1]
    assert values == {
        "chosen": {own}, "flip": {-own}, "wrong_layer": {own}, "random": {own}, "shuffled": {own},
    }  # fmt: skip
    line = f"add(caa, 1 raw) at 2-3; add(caa, {own}) at 1"
    lined = study(directions=made.directions, lines=[line], sites=())
    first = lined.grid(SCALE)[0].steer
    assert [one.value for one in first] == pytest.approx([*lengths[2:4].tolist(), own], rel=1e-5)


def test_the_plan_says_where_a_coefficient_hardly_steers(tiny):
    median = study(as_chat=False).scale(tiny).medians
    small, edge = 0.019 * min(median[2:4]), 0.021 * max(median[2:4])

    def notes(*coefficients, **changes):
        made = study(coefficients=coefficients, as_chat=False, **changes)
        told = Plan.of(made, tiny, timed=False).notes
        return [note for note in told if "hardly steer" in note]

    (said,) = notes(small, edge, "0.001 dose")
    assert f"{small:g} is 1." in said and f"{edge:g}" not in said and "0.001" not in said
    weak = {"directions": {"d": 0.001 * direction()}}
    (said,) = notes("-1 raw", **weak)
    assert "-1 raw is 0." in said
    assert notes(edge) == notes("0.001 dose") == notes(0) == []
    # a clamp to a small value takes the concept out, which is no small step
    assert notes(small, operators=["clamp"]) == []
    assert notes(lines=[f"add(d, {small}) at 2"], sites=())


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
        study(build=[build], **{part: [shown, "Another one?"]})
    other = chat("Do you want peace?", answer="(A)")
    assert study(build=[other], **{part: [shown, "Another one?"]})


def test_a_whole_text_that_built_a_direction_is_no_neutral_text():
    with pytest.raises(RequestError, match="asked in both build and neutral"):
        study(build=["one two three four"], neutral=["one two three four"])


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
            study(directions={"d": made}, prove=["Will you  lie?", "Another one?"])
        assert study(directions={"d": made}, prove=["Will you help?", "Another one?"])


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


REST = "directions: {d: x}\nprompts: {prove: [b]}\n"
ALL = "directions: {d: x}\nprompts: {all: [a, b, c],"


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
        (f"{REST}sampling: {{max_new_tokens: 4.0}}", "max_new_tokens is 4.0, .*whole number: 4$"),
        (f"{REST}sampling: {{top_k: 50.0}}", "top_k is 50.0, expected a whole number: 50$"),
        (
            f"{REST}sampling: {{temperature: yes}}",
            "temperature is True, expected a number; in",
        ),
        (f"{REST}sampling: {{temperature: 1e-1}}", "'1e-1', expected a number; written as 0.1 it"),
        (f"{REST}sampling: {{temperature: .nan}}", "temperature is nan, expected a number"),
        (f"{REST}sampling: {{temperature: null}}", "temperature is None, expected a number"),
        (f"{REST}sampling: {{max_new_tokens: [4]}}", r"max_new_tokens is \[4\], expected a whole"),
        (f"{ALL} share: '0.5'}}", "share is '0.5', expected a number; written as 0.5"),
        (f"{ALL} share: 1/2}}", "share is '1/2', expected a number$"),
        (f"{ALL} share: 1.5}}", "cannot be split into 1.5"),
        (f"{ALL} seed: [1]}}", r"seed is \[1\], expected a whole number"),
        (f"{ALL} seed: 1.0}}", "seed is 1.0, expected a whole number: 1$"),
        (f"{REST}as_chat: 'no'", "as_chat is 'no', expected true or false, without quotes"),
        (f"{REST}as_chat: 1", "as_chat is 1, expected true or false"),
        (f"{REST}question: 7", "question is 7, expected text; put it in quotes"),
        (f"{REST}revision: 1234567", "revision is 1234567, expected text; put it in quotes"),
        (f"{REST}revision: 2024-05-01", "revision is 2024-05-01, expected text; put it in quotes"),
        (f"{REST}model: [a]", r"model is \['a'\], expected text"),
        (f"{REST}chunk: '8'", "chunk is '8', expected a whole number"),
        (f"{REST}seeds: [0, '1']", "seeds hold '1', expected a whole number"),
        (f"{REST}seeds: {{a: 1}}", "seeds is {'a': 1}, expected a whole number, or several"),
        (f"{REST}concept: [yes, Paris]", "concept hold True, expected text; in YAML an unquoted"),
        (f"{REST}concept: [null]", "concept hold None, expected text$"),
        (f"{REST}coefficients: [[1]]", r"coefficients hold \[1\], expected a number or text"),
        (f"{REST}coefficients: [.inf]", "coefficients hold inf, expected a number or text"),
        (f"{REST}limits: {{rep3: '0.2'}}", "the limit of rep3 is '0.2', expected a number"),
        (f"{REST}limits: {{on: 1}}", "a metric of the limits is True, expected text"),
        (f"{REST}limits: {{rep3: .nan}}", "the limit of rep3 is nan, expected a number"),
        (f"{REST}controls: {{flip: 'no'}}", "flip is 'no', expected true or false"),
        (f"{REST}chunk: .inf", "chunk is inf, expected a whole number$"),
        (f"{REST}seeds: .nan", "seeds is nan, expected a whole number, or several$"),
        (f"{REST}seeds: {2**63}", "seeds is 92.*, expected a whole number, or several; of at most"),
        (f"{REST}limits: {{rep3: {2**63}}}", "the limit of rep3 is 92.*, expected a number; of at"),
        (f"directions: {{d: x}}\nprompts: {{prove: {'a' * 300}}}", "no prompt file aaa"),
        ('directions: {d: x}\nprompts: {prove: "a\\0b"}', "no prompt file a"),
        (f'{REST}question: "\\ud800"', "half a character"),
        (f"{REST}on: 1", "a field is named True, expected text; YAML reads an unquoted"),
        (f"{REST}sites: 1\nseeds: 0\nsites: 2", "holds 'sites' twice, in lines 3 and 5"),
        (f"{REST}controls: {{random: 1, flip: no, random: 2}}", "holds 'random' twice"),
        (f"{REST}seeds: 1:30", "holds 1:30, which YAML reads as 90"),
        (f"{REST}seeds: 010", "holds 010, which YAML reads as 8"),
        ("directions: {d: {feature: starter, index: '7'}}\nprompts: {prove: [b]}", "index of dir"),
        ("directions: {d: {feature: 7}}\nprompts: {prove: [b]}", "feature of direction 'd' is 7"),
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


def test_a_studys_directions_are_stored_ones_by_name_and_files_by_path(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path / "cache"))
    direction(1).save(tmp_path / "cache" / "directions" / "joy.safetensors")
    direction(2).save(tmp_path / "study" / "joy.safetensors")
    path = tmp_path / "study" / "study.yaml"

    def read(told: str):
        path.write_text(
            f"directions: {{d: {told}}}\nprompts: {{choose: [a], prove: [b]}}\nsites: 1\n"
            "coefficients: 1\nmetrics: length\n"
        )
        return StudyFile.read(path).study(tiny).directions["d"]

    assert read("joy.safetensors") == read("./joy.safetensors") == direction(2)
    with pytest.raises(RequestError, match=r"'joy' is the stored direction .* and another file"):
        read("joy")
    (path.parent / "joy.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"joy\.safetensors is damaged"):
        read("joy.safetensors")
    (path.parent / "joy.safetensors").unlink()
    (path.parent / "joy").mkdir()  # as a run folder may be called
    assert read("joy") == direction(1)
