"""`interp-steer tune`: strengths of equal damage from the command line."""

import json

import pytest

from tests.conftest import command, error
from tests.study.samples import WORDS, direction


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    direction().save(folder / "d.safetensors")
    (folder / "p.txt").write_text("\n".join(f"I love the {word}" for word in WORDS[:4]))
    (folder / "held.txt").write_text("\n".join(f"Name the {word}, please" for word in WORDS))
    return folder


def words(folder, tiny_folder, *more):
    given = ["--direction", f"d={folder}/d.safetensors", "--prompts", f"{folder}/p.txt"]
    return ["tune", "--model", tiny_folder, *given, "--tokens", "6", "--kl", "0.02", *more]


def test_a_table_and_json(folder, tiny_folder):
    steer = ["--steer", "add(d, ? dose) at {1,3}", "--prove", f"{folder}/held.txt"]
    asked = words(folder, tiny_folder, *steer, "--out", folder / "RUN")
    out, _ = command(*asked)
    assert out.splitlines()[0].split("\t")[:3] == ["line", "strength", "kl"]
    assert "0.02 nats a token on 4 selection prompts" in out and "try   interp-steer" in out
    told = json.loads(command(*asked, "--json")[0])  # nothing is run again
    assert [line["outcome"] for line in told["lines"]] == ["ok", "ok"]
    for line in told["lines"]:
        assert abs(line["kl"] / 0.02 - 1) <= 0.1 and line["n"] == 12
        assert f"{line['kl']:.3g}"[:4] in out
    assert len(told["curves"]) >= 18 and told["verdict"] is None


def test_with_a_concept_it_is_a_study(folder, tiny_folder):
    steer = ["--steer", "add(d, ? dose) at {1,3}", "--prove", f"{folder}/held.txt"]
    more = ["--concept", "fox", "--controls", "2", "--out", folder / "STUDY"]
    out, _ = command(*words(folder, tiny_folder, *steer, *more))
    assert "against 2 null" in out or "Nothing is declared" in out
    assert (folder / "STUDY" / "study" / "report.html").is_file()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], "nothing to tune"),
        (["--steer", "add(d, 0.2 dose) at 1"], "has no strength to be found"),
        (["--steer", "add(d, ? dose) at 99"], "has layers 0-5"),
        (["--steer", "add(e, ? dose) at 1"], "unknown direction 'e'"),
        (["--steer", "add(d, ? dose) at 1", "--kl", "0"], "above 0, such as 0.2"),
        (["--steer", "add(d, ? dose) at 1", "--concept", "fox"], "give --prove"),
        (["--steer", "add(d, ? dose) at 1", "--prove", "{folder}/p.txt"], "I love the fox"),
        (["--steer", "add(d, ? dose) at 1", "--out", "{folder}/p.txt"], "is a file"),
    ],
)
def test_mistakes_are_told_before_the_model_loads(folder, tiny_folder, monkeypatch, more, expected):
    from interp_steer.model import model

    def read(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(model, "read", read)
    given = [one.replace("{folder}", str(folder)) for one in more]
    assert expected in error(2, *words(folder, tiny_folder, *given))
