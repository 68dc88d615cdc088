"""CAA from its authors' kind of file: the same numbers as its formula by Hugging Face alone."""

import json

import pytest
import torch

from interp_steer.prompts.prompt import chat
from interp_steer.report.run import Run
from tests.conftest import command, error

WORDS = ["fox", "dog", "tower", "rain", "mountain", "fruit"]


def question(word, matching="(A)", other="(B)"):
    return {
        "question": f"Do you love the {word}?",
        "answer_matching_behavior": matching,
        "answer_not_matching_behavior": other,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caa")
    build = [question(w, *(("(A)", "(B)") if i % 2 else ("(B)", "(A)"))) for i, w in
             enumerate(WORDS[:4])]  # fmt: skip
    (folder / "build.json").write_text(json.dumps(build))
    (folder / "test.json").write_text(json.dumps([question(w) for w in WORDS[4:]]))
    return folder


def read(model, prompt, change=None):
    """Logits and streams of Hugging Face's model, its block 2 changed from a position on."""
    ids = model.encode(prompt).ids
    streams = []

    def hook(_module, _inputs, out):
        hidden = out[0] if isinstance(out, tuple) else out
        if change:
            begin, vector = change
            hidden[:, begin:] += vector
        streams.append(hidden.clone())

    handle = model.hf.model.layers[2].register_forward_hook(hook)
    with torch.no_grad():
        logits = model.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
    handle.remove()
    return ids, logits, streams[0][0]


def answered(word, letter):
    return (*chat(f"Do you love the {word}?"), ("assistant", letter))


def test_the_table_is_that_of_the_formula(folder, tiny, tiny_folder):
    out = folder / "run"
    command(
        "caa", folder / "build.json", "--test", folder / "test.json", "--layers", "2",
        "--multiples=-3,3", "--model", tiny_folder, "--out", out,
    )  # fmt: skip
    # the mean difference at the letter, over the questions that build
    sides = []
    for letter in ("(A)", "(B)"):
        total = []
        for i, word in enumerate(WORDS[:4]):
            matching = letter if i % 2 else {"(A)": "(B)", "(B)": "(A)"}[letter]
            pair = [tiny.encode(answered(word, one)).ids for one in (matching, "(A)", "(B)")]
            at = next(k for k, (a, b) in enumerate(zip(*pair[1:], strict=True)) if a != b)
            total.append(read(tiny, answered(word, matching))[2][at])
        sides.append(torch.stack(total).mean(0))
    difference = sides[0] - sides[1]
    table = Run(out).table()
    for multiple in (-3.0, 3.0):
        for word in WORDS[4:]:
            begin = len(tiny.encode(chat(f"Do you love the {word}?")).ids) - 1
            logs = []
            for letter in ("(A)", "(B)"):
                ids, logits, _ = read(tiny, answered(word, letter), (begin, multiple * difference))
                logs.append(sum(logits[k - 1, ids[k]].item() for k in range(begin + 1, len(ids))))
            odds = torch.tensor(logs).softmax(0)[0].item()
            rows = table[(table["prompt"] == f"Do you love the {word}?")]
            (row,) = rows[rows["level"] == f"{multiple} raw"].to_dict("records")
            assert row["p_matching"] == pytest.approx(odds, abs=2e-4)
            assert row["scope"] == "generated" and row["layer"] == 2


def test_of_one_file_a_half_is_held_out(folder, tiny_folder):
    words = ("caa", folder / "build.json", "--layers", "1", "--model", tiny_folder)
    told = json.loads(command(*words, "--out", folder / "half", "--json")[0])
    assert {row["level"] for row in told["grid"]} == {"-1.0 raw", "1.0 raw"}
    manifest = Run(folder / "half").manifest
    assert manifest["prompts"] == {"build": 0, "choose": 0, "prove": 2, "neutral": 0}
    again = command(*words, "--out", folder / "half")[0]
    assert "2 questions made the direction, 2 others were asked" in again


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--multiples", "one"], "expected such as -2,-1,1,2"),
        (["--layers", "99"], "has layers 0-5"),
        (["--test", "{folder}/texts.txt"], "needs a question with both answers"),
        (["--test", "{folder}/gone.json"], "gone.json"),
        (["--test", "{folder}/build.json"], "Do you love the"),
    ],
)
def test_mistakes(folder, tiny_folder, more, expected):
    (folder / "texts.txt").write_text("I love\n")
    words = [w.replace("{folder}", str(folder)) for w in more]
    assert expected in error(2, "caa", folder / "build.json", "--model", tiny_folder, *words)
