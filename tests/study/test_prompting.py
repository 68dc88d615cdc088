"""Prompts in place of steering: the baseline beside every steered setting."""

import json

import pytest
import torch

from interp_steer.errors import RequestError
from interp_steer.prompts.prompt import chat
from interp_steer.report import report as page
from interp_steer.study.cell import Prompting
from interp_steer.study.file import StudyFile
from interp_steer.study.plan import Plan, forecast
from interp_steer.study.study import Study
from tests.study.samples import study

ARMS = {"told": {"system": "Speak of rain."}, "asked": {"user": "Speak of rain, please."}}


def test_where_it_is_said():
    assert Prompting("Be brief.").put(chat("Hi")) == chat("Hi", "Be brief.")
    assert Prompting("Be brief.").put(chat("Hi", "Be long.")) == chat("Hi", "Be brief.")
    assert Prompting(user="Rain!").put(chat("Hi", "S", "So")) == chat("Rain!\n\nHi", "S", "So")
    assert Prompting(user="Rain!").put("Hi") == "Rain!\n\nHi"
    talk = (("user", "One"), ("assistant", "Two"), ("user", "Three"))
    assert Prompting("S", "U").put(talk) == (("system", "S"), *talk[:2], ("user", "U\n\nThree"))
    with pytest.raises(RequestError, match="needs a chat"):
        Prompting("Be brief.").put("Hi")
    with pytest.raises(RequestError, match="no user speaks"):
        Prompting(user="U").put((("assistant", "Two"),))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"told": {"sistem": "x"}}, "unknown field 'sistem'; nearest: system"),
        ({"told": {}}, "says nothing"),
        ({"told": {"system": " "}}, "says nothing"),
        ({"told": {"user": 3}}, "expected text"),
        ({"told": "Be brief."}, "expected fields: system, user"),
        ({"d": {"user": "x"}}, "no direction's name"),
        ({"2 words": {"user": "x"}}, "cannot name a prompt"),
    ],
)
def test_what_cannot_be_said_is_refused(given, expected):
    with pytest.raises(RequestError, match=expected):
        study(prompting=given)


@pytest.fixture(scope="module")
def ran(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompted")
    return study(prompting=ARMS).run(tiny, folder / "RUN")


def test_each_has_a_row_a_prompt_and_is_asked_by_every_metric(tiny, ran):
    table = ran.table()
    told = table[table["role"] == "prompted"]
    assert len(told) == 2 * 4 and set(told["split"]) == {"prove"} and set(told["direction"]) == {
        "told", "asked"}  # fmt: skip
    assert told["steer"].isna().all() and told[["rep3", "surprise", "kl_mean"]].notna().all(
        axis=None
    )
    assert set(told["prompting"]) == {
        "system prompt: Speak of rain.", "before the question: Speak of rain, please."
    }  # fmt: skip
    row = told[told["direction"] == "told"].iloc[0]
    plain = table[(table["role"] == "unsteered") & (table["item"] == row["item"])].iloc[0]
    asked = chat(row["prompt"], "Speak of rain.")
    # by Hugging Face: what it answers, and the KL of its answers from the unsteered ones
    ids = tiny.encode(asked).ids
    out = tiny.hf.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    raw = {r["key"]: r for r in map(json.loads, (ran.folder / "rows.jsonl").open()) if "key" in r}
    key = next(
        p["key"] for p in ran.plan
        if (p["role"], p["direction"], p["item"]) == ("prompted", "told", row["item"])
    )  # fmt: skip
    said = raw[key]["token_ids"]
    assert said == out.tolist()[: len(said)]
    forced = raw[
        next(p["key"] for p in ran.plan
             if (p["role"], p["item"]) == ("unsteered", row["item"]))
    ]["token_ids"]  # fmt: skip
    logs = []
    for prompt in (chat(row["prompt"]), asked):
        start = tiny.encode(prompt).ids
        with torch.no_grad():
            logits = tiny.hf(torch.tensor([[*start, *forced]])).logits[0, len(start) - 1 :]
        logs.append(logits.log_softmax(-1))
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    assert row["kl_mean"] == pytest.approx(kl.mean().item(), abs=1e-4)
    # its answer is read after the plain question, as every other answer is
    start = tiny.encode(chat(row["prompt"])).ids
    with torch.no_grad():
        logits = tiny.hf(torch.tensor([[*start, *said]])).logits[0, len(start) - 1 : -1]
    own = logits.log_softmax(-1).gather(1, torch.tensor([said]).T)
    assert row["surprise"] == pytest.approx(-own.mean().item(), abs=1e-4)
    assert plain["kl_mean"] == 0


def test_the_findings_set_it_beside_steering(ran):
    found = ran.findings()
    claims = found.claims[found.claims["role"] == "prompted"]
    assert set(claims["direction"]) == {"told", "asked"}
    asking = found.asking[found.asking["metric"] == "kl_mean"]
    assert len(asking) == 2
    table = ran.table()
    means = table[table["split"] == "prove"].groupby(["role", "direction"])["kl_mean"].mean()
    for row in asking.to_dict("records"):
        expected = means["chosen", "d"] - means["prompted", row["prompting"]]
        assert row["difference"] == pytest.approx(expected) and row["n"] == 4
    assert "steering less prompt told" in str(found)
    html = page.write(ran).read_text()
    assert "Is it better than asking?" in html and "prompt told" in html
    assert "<strong>told</strong>, system prompt: Speak of rain." in html


def test_rows_are_forecast_and_found_again(tiny, ran):
    one = study(prompting=ARMS)
    assert forecast(one)["prove"] == forecast(study())["prove"] + 2 * 4
    assert Plan.of(one, tiny, timed=False).rows["prove"] == forecast(one)["prove"]
    before = (ran.folder / "rows.jsonl").read_bytes()
    one.run(tiny, ran.folder)
    assert (ran.folder / "rows.jsonl").read_bytes() == before
    again = StudyFile.read(ran.folder / "study.yaml").study(tiny)
    assert again.prompting == ARMS


def test_a_study_without_it_is_described_as_before(tiny, tmp_path):
    plain = study(choose=(), sites="1", coefficients=["0.3 dose"], controls=study().controls)
    run = plain.run(tiny, tmp_path / "RUN")
    assert "prompting" not in run.manifest
    assert "prompting" not in (run.folder / "study.yaml").read_text()


def test_a_sweep_without_a_choice_shows_it_too(tiny, tmp_path):
    from tests.study.samples import direction

    swept = Study.sweep(
        "add(d, {1,2}) at 2", ["I love the fox"], {"d": direction()}, prompting=ARMS
    )
    table = swept.run(tiny, tmp_path / "RUN").table()
    assert len(table[table["role"] == "prompted"]) == 2
    assert forecast(swept)["grid"] == 4
