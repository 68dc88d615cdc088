"""A study file: its mistakes, and where its directions lie."""

import pytest

from interp_steer.errors import RequestError, RunError
from interp_steer.study.file import StudyFile
from tests.study.samples import direction

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
