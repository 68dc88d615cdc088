"""`interp-steer judge` on a study's run, against a judge on loopback."""

import json

import pytest

from tests.conftest import command, error
from tests.study.samples import study
from tests.tune.test_judge import server  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    words = ["one", "two", "six", "ten", "red", "old", "big", "sad", "dry", "hot"]
    prompts = [f"Name the {word}, please" for word in words]
    asked = {"told": {"system": "Speak of rain."}}
    one = study(prove=prompts, prompting=asked, metrics=["kl_mean", "length"])
    return one.run(tiny, tmp_path_factory.mktemp("judged") / "RUN").folder


def test_every_arm_is_rated_and_what_is_missing_is_told(folder, server):  # noqa: F811
    texts = {}

    def reply(prompt, body, number):
        if "big" in prompt:
            return {"text": "no idea"}
        return {"text": "Rating: [[1]]" if "concept" in prompt[:80] else "Rating: [[2]]"}

    server.reply = reply
    words = ["judge", folder, "--concept", "rain", "--judge-url", server.url, "--judge-model", "j"]
    told = json.loads(command(*words, "--json")[0])
    arms = {one["arm"]: one for one in told["arms"]}
    assert set(arms) == {"unsteered", "prompt told"} | {a for a in arms if a.startswith("add(d")}
    assert len(arms) == 3
    for one in arms.values():
        assert one["n"] == 10 and one["missing"] == 1 and one["instruction"] == 2
        assert one["score"] == pytest.approx(1.5) and one["missing_zero"] == pytest.approx(1.35)
    texts = {(a["arm"], a["item"]): a["text"] for a in told["answers"]}
    assert len(texts) == 30 and all(isinstance(text, str) for text in texts.values())
    before = len(server.bodies)
    out, _ = command(*words)  # asks again only for what is missing
    missing = sum(one["missing"] for one in arms.values())
    assert len(server.bodies) - before <= 3 * missing + 3
    assert "known ratings came out right" in out and "missing_zero" in out
    assert "take another one" in out


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--concept", "rain"], "which judge?"),
        (["--concept", " ", "--judge-url", "http://127.0.0.1:9", "--judge-model", "j"], "is empty"),
        (["--concept", "rain", "--judge-url", "localhost", "--judge-model", "j"], "no address"),
        (["--concept", "rain", "--judge-model", "j", "--judge-url", "http://127.0.0.1:9",
          "--rubrics", "none"], "no rubric"),
    ],
)  # fmt: skip
def test_mistakes(folder, more, expected):
    assert expected in error(2, "judge", folder, *more)


def test_a_folder_without_a_run(tmp_path):
    words = ["--concept", "x", "--judge-url", "http://127.0.0.1:9", "--judge-model", "j"]
    assert "no run in" in error(2, "judge", tmp_path, *words)
