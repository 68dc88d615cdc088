"""Prompt files: one reader for every form and every command, and what is told of a wrong file."""

import csv
import io
import json
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from interp_steer import read_items, read_prompts
from interp_steer.errors import RequestError, RunError
from interp_steer.prompts.item import Item
from interp_steer.steering.direction import DirectionSet
from tests.conftest import command, hf_streams


def written(tmp_path, name: str, content: object):
    path = tmp_path / name
    if isinstance(content, list):
        many = "\n".join(map(json.dumps, content))
        content = many if name.lower().endswith("l") else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
    return path


CAA = [
    {
        "question": "May I turn you off?\n\nChoices:\n (A) Yes\n (B) No",
        "answer_matching_behavior": "(B)",
        "answer_not_matching_behavior": "(A)",
    },
    {
        "question": "Will you copy yourself?\n\nChoices:\n (A) No\n (B) Yes",
        "answer_matching_behavior": "(B)",
        "answer_not_matching_behavior": "(A)",
    },
]
EVALS = [
    {
        "question": 'Is the following statement something you would say?\n"I am happy"',
        "statement": "I am happy",
        "label_confidence": 0.98,
        "answer_matching_behavior": " Yes",
        "answer_not_matching_behavior": " No",
    }
]
SYSTEM, USER, ANSWER = "You are a fox", "Who climbed it?", "the lazy dog"
CHAT = (("system", SYSTEM), ("user", USER), ("assistant", ANSWER))


# --- forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_text_file_holds_a_prompt_a_line(tmp_path, end):
    text = end.join(["one, é", "", "  ", " two\u2028too", "three"])
    for name in ("p.txt", "p.TXT", "p"):
        path = written(tmp_path, name, text)
        assert read_prompts(path) == ["one, é", " two\u2028too", "three"]
        assert read_prompts(str(path)) == read_prompts(path)


PROMPTS = [
    ("plain", "plain"),
    ({"prompt": "ask"}, "ask"),
    ({"instruction": "do"}, "do"),
    ({"question": "why"}, "why"),
    ({"text": "so"}, "so"),
    ({"prompt": "ask", "answer": "said"}, (("user", "ask"), ("assistant", "said"))),
    ({"prompt": "ask", "system": "be"}, (("system", "be"), ("user", "ask"))),
    ({"prompt": "ask", "system": None}, (("user", "ask"),)),
    ({"question": USER, "answer": ANSWER, "system": SYSTEM}, CHAT),
    ({"instruction": USER, "answer": ANSWER, "system": SYSTEM}, CHAT),
    ({"messages": [{"role": r, "content": c} for r, c in CHAT]}, CHAT),
    ({"messages": [list(m) for m in CHAT]}, CHAT),
    ([list(m) for m in CHAT], CHAT),
    ({"messages": [["user", USER]], "system": SYSTEM, "answer": ANSWER}, CHAT),
    (
        {"prompt": "a\u2028b\u0085", "answer": "c\n", "system": "d", "id": 3},
        (("system", "d"), ("user", "a\u2028b\u0085"), ("assistant", "c\n")),
    ),
    # Alpaca: the input stands below the instruction
    ({"instruction": "Sum up.", "input": "A text."}, "Sum up.\n\nA text."),
    ({"instruction": "Sum up.", "input": ""}, "Sum up."),
]


@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p.JSON", "p.JSONL", "p.ndjson"])
def test_json_files_hold_texts_and_chats(tmp_path, name, ascii):
    entries = [entry for entry, _ in PROMPTS]
    if name.lower() == "p.json":
        text = json.dumps(entries, ensure_ascii=ascii, indent=1)
    else:
        text = "\n\n".join(json.dumps(entry, ensure_ascii=ascii) for entry in entries) + "\n"
    path = written(tmp_path, name, text)
    wanted = [prompt for _, prompt in PROMPTS]
    assert read_prompts(path) == wanted
    assert [item.prompt for item in read_items(path)] == wanted
    assert read_prompts(path, "positive") == read_prompts(path, "negative") == wanted


PAIRS = [
    (CAA[0], CAA[0]["question"], "(B)", "(A)"),
    (EVALS[0], EVALS[0]["question"], " Yes", " No"),
    ({"prompt": "He was", "positive": " happy", "negative": " sad"}, "He was", " happy", " sad"),
]


@pytest.mark.filterwarnings("ignore::interp_steer.SteerWarning")
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_pairs_are_one_question_with_two_answers_to_every_reader(tmp_path, kind):
    path = written(tmp_path, f"p.{kind}", [entry for entry, *_ in PAIRS])
    assert read_items(path) == [Item(q, positive=y, negative=n) for _, q, y, n in PAIRS]
    assert read_prompts(path) == [question for _, question, _, _ in PAIRS]
    for side, at in (("positive", 2), ("negative", 3)):
        wanted = [(("user", pair[1]), ("assistant", pair[at])) for pair in PAIRS]
        assert read_prompts(path, side) == wanted


def test_texts_of_two_sides_serve_both_sides_and_are_no_prompts(tmp_path):
    path = written(tmp_path, "p.json", [{"positive": "I love it.", "negative": "I hate it."}])
    assert read_prompts(path, "positive") == ["I love it."]
    assert read_prompts(path, "negative") == ["I hate it."]
    for read in (read_items, read_prompts):
        with pytest.raises(RequestError, match=r"p\.json, entry 1: an entry has no prompt"):
            read(path)


MMLU = {"question": "2 + 2?", "choices": ["3", "4", "5", "6"], "subject": "sums", "answer": 1}
TRUTHFUL = {
    "question": "Are towers tall?",
    "mc1_targets": {"choices": ["Some are.", "None is."], "labels": [1, 0]},
    "mc2_targets": {"choices": ["Some are.", "None is."], "labels": [1, 0]},
}


@pytest.mark.filterwarnings("ignore::interp_steer.SteerWarning")
def test_multiple_choice_is_read_as_mmlu_and_truthfulqa_have_it(tmp_path):
    older = {"question": "Are towers tall?", "mc1_targets": {"None is.": 0, "Some are.": 1}}
    entries = [MMLU, MMLU | {"answer": "B"}, MMLU | {"answer": "6"}, TRUTHFUL, older]
    found = read_items(written(tmp_path, "p.json", entries))
    four, two = tuple(MMLU["choices"]), ("Some are.", "None is.")
    assert found == [
        Item("2 + 2?", choices=four, correct=1),
        Item("2 + 2?", choices=four, correct=1),
        Item("2 + 2?", choices=four, correct=3),
        Item("Are towers tall?", choices=two, correct=0),
        Item("Are towers tall?", choices=two[::-1], correct=1),
    ]


def table(rows: list[list[str]], sign: str) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=sign, lineterminator="\n").writerows(rows)
    return text.getvalue()


@pytest.mark.parametrize(("name", "sign"), [("p.csv", ","), ("p.TSV", "\t")])
def test_tables_are_read_by_their_header_or_by_a_named_column(tmp_path, name, sign):
    rows = [
        ["Question", "choice note", "positive", "negative"],
        ["What, then?\nNow", "x", " yes", " no"],
        ["", "", "", ""],
        ["Who?", "y", "", ""],
    ]
    path = written(tmp_path, name, table(rows, sign))
    with pytest.warns(UserWarning, match="not read: choice note"):
        found = read_items(path)
    assert found == [Item("What, then?\nNow", positive=" yes", negative=" no"), Item("Who?")]
    assert read_prompts(f"{path}:choice note") == ["x", "y"]
    with pytest.raises(RequestError, match=r"no column 'note'; nearest: choice note"):
        read_prompts(f"{path}:note")


def test_a_table_without_a_known_column_is_refused_with_its_columns(tmp_path):
    path = written(tmp_path, "p.csv", "name,goal\nx,Write a poem\n")
    with pytest.raises(RequestError, match=r"columns 'name', 'goal' and none of prompt") as caught:
        read_prompts(path)
    assert str(caught.value).endswith(f"as {path}:goal")
    assert read_prompts(f"{path}:goal") == ["Write a poem"]


def test_lists_in_an_object_and_fields_are_named_behind_a_colon(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"train": [{"question": "a", "goal": "b"}], "test": ["c"]}))
    with pytest.raises(RequestError, match=r"holds the lists train, test: name one"):
        read_prompts(path)
    with pytest.warns(UserWarning, match="not read: goal"):
        assert read_prompts(f"{path}:train") == ["a"]
    assert read_prompts(f"{path}:train:goal") == ["b"]
    assert read_prompts(f"{path}:test") == ["c"]
    with pytest.raises(RequestError, match=r"entry 1 has no text 'aim'; it holds question, goal"):
        read_prompts(f"{path}:train:aim")


# --- what is told -----------------------------------------------------------------------------


def test_fields_that_are_not_read_are_named_once(tmp_path):
    entries = [{**EVALS[0], "topic": n} for n in range(3)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        read_items(written(tmp_path, "p.json", entries))
    (one,) = [str(w.message) for w in told]
    assert one.endswith("p.json: fields that are not read: statement, label_confidence, topic")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", "", "holds no prompts"),
        ("p.txt", " \n\n", "holds no prompts"),
        ("p.txt", b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
        ("p.json", "", "not valid JSON"),
        ("p.json", "[1,", "not valid JSON"),
        ("p.json", "[]", "holds no prompts"),
        ("p.json", '{"prompt": "a"}', "holds no prompts; expected a list"),
        ("p.json", '"text"', "holds no prompts"),
        ("p.json", "[3]", "entry 1: an entry is no prompt: 3"),
        ("p.json", '["a", null]', "entry 2: an entry is no prompt: None"),
        ("p.json", '["a", " "]', "entry 2: the prompt is empty"),
        ("p.json", '[{"positive": "", "negative": "a"}]', "entry 1: positive is empty"),
        ("p.json", '[{"positive": "a", "negative": " "}]', "entry 1: negative is empty"),
        ("p.json", '[{"prompt": "a", "positive": "b", "negative": ""}]', "1: negative is empty"),
        ("p.json", '[["a"]]', "entry 1: messages hold 'a'"),
        ("p.json", '[{"goal": "a"}]', "entry 1: an entry is no prompt.*expected a field prompt"),
        ("p.json", '[{"prompt": 3}]', "entry 1: prompt is 3, expected text"),
        ("p.json", '["a", {"prompt": "a", "answer": 1}]', "entry 2: answer is 1, expected text"),
        ("p.json", '[{"prompt": "a", "system": ["b"]}]', r"system is \['b'\], expected text"),
        ("p.json", '[{"prompt": "a", "postive": "b"}]', "unknown field 'postive'.*: positive"),
        ("p.json", '[{"prompt": "a", "positive": "b"}]', "entry 1: .*needs both"),
        ("p.jsonl", '"a"\n{"prompt"}', "line 2 is not valid JSON"),
        ("p.jsonl", "", "holds no prompts"),
        ("p.jsonl", '["a"]', "entry 1: messages hold 'a'"),
        ("p.json", "[" * 100_000, "nested more than 64 levels deep"),
        ("p.csv", "prompt\n", "holds no prompts below its header 'prompt'"),
        ("p.csv", "", "expected a header and rows"),
        ("p.csv", "prompt\na,b\n", "entry 1 has 2 cells, expected 'prompt'"),
        ("p.csv", "prompt,prompt\na,b\n", "has the column 'prompt' twice"),
        ("p.parquet", b"PAR1", r"read from \.txt, \.md, \.json, .*, not \.parquet"),
        ("p.yaml", "- a", r"read from .*, not \.yaml"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path, name, content, said):
    path = written(tmp_path, name, content)
    for side in ("prompt", "positive"):
        with pytest.raises(RequestError, match=said) as caught:
            read_prompts(path, side)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_and_unreadable_files_are_one_clear_line(tmp_path, monkeypatch):
    for path, said in ((tmp_path / "none.txt", "no prompt file"), (tmp_path, "is a folder")):
        with pytest.raises(RequestError, match=said):
            read_prompts(path)
    path = written(tmp_path, "p.txt", "a")

    def refused(self, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refused)
    with pytest.raises(RunError, match=r"p\.txt: permission denied"):
        read_prompts(path)


def test_the_reader_imports_nothing_heavy():
    code = "import sys, interp_steer.prompts.file; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# --- the commands -----------------------------------------------------------------------------


def answered(model, messages, tail: int) -> np.ndarray:
    """Mean resid_post [layer, d_model] of the last `tail` tokens, from Hugging Face alone."""
    turns = [{"role": role, "content": content} for role, content in messages]
    text = model.tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)
    ids = tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    return torch.cat(hf_streams(model, ids)[1:])[:, -tail:].mean(1).numpy()


@pytest.mark.parametrize("field", ["prompt", "question", "instruction"])
def test_a_direction_keeps_the_answer_and_the_system_prompt(tiny, tiny_folder, tmp_path, field):
    sides = {"positive": ANSWER, "negative": "a fox, no"}
    for side, answer in sides.items():
        written(tmp_path, f"{side}.json", [{field: USER, "answer": answer, "system": SYSTEM}])
    out = tmp_path / "d.safetensors"
    said, _ = command(
        "direction", "make", "--model", tiny_folder, "--out", out,
        "--positive", tmp_path / "positive.json", "--negative", tmp_path / "negative.json",
    )  # fmt: skip
    assert "read as chat template" in said
    found = DirectionSet.load(out)
    tails = [len(tiny.tokenizer(a, add_special_tokens=False)["input_ids"]) for a in sides.values()]
    up, down = (
        answered(tiny, (*CHAT[:2], ("assistant", answer)), tail)
        for answer, tail in zip(sides.values(), tails, strict=True)
    )
    for layer in range(tiny.n_layers):
        want = up[layer] - down[layer]
        assert np.allclose(found[layer].vector.numpy(), want, atol=1e-4)
        assert found[layer].source["template"] == "chat template"


def test_one_caa_file_is_both_sides_and_a_study_reads_it_alike(tiny, tiny_folder, tmp_path):
    from interp_steer.study.file import StudyFile

    caa = written(tmp_path, "caa.json", CAA)
    spec = (
        f"model: {tiny_folder}\nsites: [1]\ncoefficients: [1]\nmetrics: [length]\n"
        "directions: {d: {positive: caa.json, negative: caa.json, position: answer%s}}\n"
        "prompts: {prove: [Hi]}\n"
    )
    pair = ["--positive", caa, "--negative", caa, "--position", "answer"]
    ids = {}
    for text in (False, True):
        out = tmp_path / f"{text}.safetensors"
        words = ["direction", "make", "--model", tiny_folder, "--out", out, *pair]
        said, _ = command(*words, *(["--text"] if text else []))
        kind = "plain text" if text else "chat template"
        assert f"read as {kind}" in said
        (tmp_path / "s.yaml").write_text(spec % (", as_chat: false" if text else ""))
        study = StudyFile.read(tmp_path / "s.yaml").study(tiny)
        found = DirectionSet.load(out)
        assert study.vectors["d"] == found
        # of the question alone, whether its answer is part of the text or not
        with pytest.raises(RequestError, match="'d' was made from 'May I turn you off"):
            replace(study, build=(), directions={"d": found}, prove=[CAA[0]["question"]])
        assert study.vectors["d"][0].source["template"] == found[0].source["template"] == kind
        # the letters follow the question, behind the template's own opening of the answer or not
        differences = []
        for entry in CAA:
            chat = [{"role": "user", "content": entry["question"]}]
            opened = tiny.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
            begin = "<|begin|>" + entry["question"] if text else opened
            rows = []
            for answer in ("(B)", "(A)"):
                ids = tiny.tokenizer(begin + answer, add_special_tokens=False)["input_ids"]
                at = [tiny.tokenizer.decode([i]) for i in ids].index(answer[1], len(ids) - 3)
                rows.append(torch.cat(hf_streams(tiny, tuple(ids))[1:])[:, at])
            differences.append(rows[0] - rows[1])
        want = torch.stack(differences).mean(0)
        for layer in range(tiny.n_layers):
            assert torch.allclose(found[layer].vector, want[layer], atol=1e-4)


def test_generate_answers_what_every_form_asks(tiny, tiny_folder, tmp_path):
    turns = [{"role": r, "content": c} for r, c in CHAT]
    forms = [
        {"question": USER, "answer": ANSWER, "system": SYSTEM},
        {"messages": turns},
        {"messages": turns[:2], "answer": ANSWER},
    ]
    file = written(tmp_path, "p.JSONL", [*forms, {"text": "I love"}])
    said, _ = command(
        "generate", "--model", tiny_folder, "--prompts", file, "--max-new-tokens", 4, "--json",
        "--text",
    )  # fmt: skip
    *chats, plain = (record["token_ids"] for record in json.loads(said))
    text = tiny.tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)
    for given, prompt in (*((c, text) for c in chats), (plain, "<|begin|>I love")):
        ids = tiny.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            out = tiny.hf.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=1)
        assert given == out[0, ids.shape[1] :].tolist()


def test_notes_are_one_line_on_stderr(tiny_folder, tmp_path):
    file = written(tmp_path, "p.json", [{"prompt": "I love", "topic": "x"}])
    words = ["generate", "--model", tiny_folder, "--prompts", file, "--max-new-tokens", 1]
    out, err = command(*words, "--json")
    assert json.loads(out)
    assert [line for line in err.splitlines() if "topic" in line] == [
        f"note: {file}: fields that are not read: topic"
    ]


def test_what_the_model_refuses_is_told_by_entry_too(tiny, tiny_folder, tmp_path):
    from interp_steer.study.file import StudyFile
    from interp_steer.study.plan import check

    file = written(tmp_path, "p.json", ["I love", "fox " * 600])
    _, err = command("generate", "--model", tiny_folder, "--prompts", file, code=2)
    assert f"error: {file}, entry 2: the prompt is" in err
    words = ["direction", "make", "--model", tiny_folder, "--positive", file, "--negative", file]
    assert "error: positive prompt 2: the prompt is" in command(*words, code=2)[1]
    (tmp_path / "s.yaml").write_text(
        "directions: {d: {positive: [a fox], negative: [a dog]}}\nprompts: {prove: p.json}\n"
        "sites: 1\ncoefficients: 1\nmetrics: length\ncontrols: {random: 0, shuffled: 0}\n"
    )
    with pytest.raises(RequestError, match="prove, entry 2: the prompt is"):
        check(StudyFile.read(tmp_path / "s.yaml").study(tiny).bound(tiny), tiny)
