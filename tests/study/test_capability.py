"""Multiple-choice questions in a study: what steering costs in ability."""

import pytest
import torch
from scipy.stats import binomtest

from interp_steer.errors import RequestError
from interp_steer.prompts.file import PromptFile
from interp_steer.prompts.item import Item
from interp_steer.report import report as page
from interp_steer.study.fields import lettered
from interp_steer.study.file import StudyFile
from interp_steer.study.plan import forecast
from tests.study.samples import study

NUMBERS = ("one", "two", "three", "four")
QUESTIONS = [
    {"question": f"Which word comes after {word}?", "choices": list(NUMBERS), "answer": letter}
    for word in ("zero", "nought", "ten", "red", "a dog", "the sun", "June", "me", "you", "it")
    for letter in "ABCD"[: 1 if word != "it" else 3]
]


def test_a_question_is_asked_as_mmlu_asks_it():
    item = Item.of(QUESTIONS[0])
    text = "Which word comes after zero?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    plain = lettered(item)
    assert (plain.prompt, plain.choices, plain.continuation) == (
        text, (" A", " B", " C", " D"), " A"
    )  # fmt: skip
    asked = lettered(item, as_chat=True, system="Be brief.")
    assert asked.prompt == (("system", "Be brief."), ("user", text))
    assert asked.choices == ("A", "B", "C", "D") and asked.correct == 0
    own = Item.of({"question": "(A) or (B)?", "choices": ["(A)", "(B)"], "answer": 1})
    assert lettered(own).prompt == own.prompt and lettered(own).continuation == "(B)"
    assert lettered(asked, as_chat=True) == asked  # a study that is read back


@pytest.mark.parametrize("header", ["", "question,A,B,C,D,answer\n"])
def test_files_of_mmlu_are_read(tmp_path, header):
    path = tmp_path / "mmlu.csv"
    path.write_text(header + '"Two, or more?",1,2,3,4,B\nWhich?,a,b,c,d,D\n')
    one, two = PromptFile.read(path).items()
    assert (one.prompt, one.choices, one.correct) == ("Two, or more?", ("1", "2", "3", "4"), 1)
    assert two.correct == 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"facts": []}, "expected questions"),
        ({"facts": "facts.csv"}, "expected questions"),
        ({"facts": ["Who?"]}, "'Who\\?' has 0 choices, expected 2 to 10"),
        ({"facts": [QUESTIONS[0], QUESTIONS[0]]}, "twice"),
    ],
)
def test_what_is_no_set_of_questions_is_refused(given, expected):
    with pytest.raises(RequestError, match=expected):
        study(capability=given)


@pytest.fixture(scope="module")
def ran(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("able")
    arms = {"told": {"system": "Speak of rain."}}
    return study(capability={"facts": QUESTIONS}, prompting=arms).run(tiny, folder / "RUN")


def test_accuracy_is_that_of_hugging_face_alone(tiny, ran):
    table = ran.table()
    rows = table[table["split"] == "capability facts"]
    assert set(rows["role"]) == {"unsteered", "chosen", "prompted"}
    assert rows["text"].isna().all(), "nothing is generated for them"
    ids = {Item.of(one).text: one for one in QUESTIONS}
    letters = [tiny.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ABCD"]
    plain = rows[rows["role"] == "unsteered"]
    assert len(plain) == len(QUESTIONS)
    for row in plain.to_dict("records"):
        question = ids[row["prompt"].split("\n")[0]]
        text = tiny.tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        start = tiny.tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            last = tiny.hf(torch.tensor([start])).logits[0, -1]
        said = "ABCD"[int(last[letters].argmax())]
        assert question["question"] in row["prompt"]
        same = [q for q in QUESTIONS if q["question"] == question["question"]]
        assert row["accuracy"] in {float(said == q["answer"]) for q in same}


def test_the_findings_pair_the_arms_over_questions(ran):
    found = ran.findings()
    table = ran.table()
    rows = table[table["split"] == "capability facts"]
    wide = rows.pivot(index="item", columns="role", values="accuracy")
    assert set(found.capability["role"]) == {"chosen", "prompted"}
    for row in found.capability.to_dict("records"):
        lost = int((wide["unsteered"] > wide[row["role"]]).sum())
        gained = int((wide["unsteered"] < wide[row["role"]]).sum())
        assert (row["lost"], row["gained"]) == (lost, gained) and row["n"] == len(QUESTIONS)
        assert row["difference"] == pytest.approx((gained - lost) / len(QUESTIONS))
        expected = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
        assert row["p"] == pytest.approx(expected)
        assert row["low"] <= row["difference"] <= row["high"]
    assert any("fewer than 200" in note for note in found.notes)
    assert "facts: " in str(found)
    # they are no held-out prompts: every other table is as without them
    assert set(found.claims["n"]) == {4} and "accuracy" not in set(found.claims["metric"])
    html = page.write(ran).read_text()
    assert "What does it cost in ability?" in html


def test_they_are_added_to_a_run_that_is_there(tiny, tmp_path):
    study().run(tiny, tmp_path / "RUN")
    before = (tmp_path / "RUN" / "rows.jsonl").read_bytes()
    one = study(capability={"facts": QUESTIONS})
    one.run(tiny, tmp_path / "RUN")
    after = (tmp_path / "RUN" / "rows.jsonl").read_bytes()
    assert after.startswith(before)
    assert after[len(before) :].count(b"\n") == 2 * len(QUESTIONS), "only questions were asked"
    more = {k: v - forecast(study())[k] for k, v in forecast(one).items()}
    assert (more["unsteered"], more["grid"], more["prove"]) == (len(QUESTIONS), 0, len(QUESTIONS))
    again = StudyFile.read(tmp_path / "RUN" / "study.yaml").study(tiny)
    again.run(tiny, tmp_path / "RUN")
    assert (tmp_path / "RUN" / "rows.jsonl").read_bytes() == after


def test_a_study_file_names_sets(tiny, tmp_path):
    (tmp_path / "mmlu.csv").write_text("Two?,1,2,3,4,B\nThree?,1,2,3,4,C\n")
    path = tmp_path / "study.yaml"
    path.write_text(
        "model: starter\ndirections: {d: {feature: starter, index: 3}}\n"
        "prompts: {choose: [a, b], prove: [c, d]}\nsites: [13]\ncoefficients: [0.4 dose]\n"
        "metrics: [kl_mean]\ncapability: {mmlu: mmlu.csv}\n"
    )
    assert [i.correct for i in StudyFile.read(path).capability()["mmlu"]] == [1, 2]
    path.write_text(path.read_text().replace("mmlu.csv}", "none.csv}"))
    with pytest.raises(RequestError, match="no prompt file"):
        StudyFile.read(path)
