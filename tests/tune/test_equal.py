"""Doses of equal KL, measured again by Hugging Face."""

import pytest
import torch

from interp_steer.errors import RequestError
from interp_steer.prompts.prompt import chat
from interp_steer.steering.grammar import parse
from interp_steer.tune.equal import equal_kl
from tests.study.samples import WORDS, direction

PROMPTS = [f"I love the {word}" for word in WORDS[:4]]
HELD_OUT = [f"Name the {word}, please" for word in WORDS]
KNOWN = {"d": direction(), "e": direction(1)}


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory):
    lines = ["add({d,e}, ? dose) at {1,3}", "rotate(d, e, ? deg) at 2", "clamp(d, ? dose) at 2"]
    return equal_kl(
        tiny, lines, PROMPTS, KNOWN, tmp_path_factory.mktemp("tuned"), target=0.02,
        held_out=HELD_OUT, length=6, batches=6,
    )  # fmt: skip


def kl_by_hugging_face(model, step, prompts, length):
    """Mean KL(unsteered || steered) over the unsteered greedy answer, with a plain hook."""
    means = []
    for prompt in prompts:
        ids = model.encode(chat(prompt)).ids
        out = model.hf.generate(torch.tensor([ids]), max_new_tokens=length, do_sample=False)
        whole = out[0].tolist()
        whole = whole[:-1] if whole[-1] in model.stop_ids else whole  # no part of the answer
        logs = []
        for delta in (None, step.directions[0].unit * step.value):

            def change(_m, _i, out, delta=delta):
                moved = (out if isinstance(out, torch.Tensor) else out[0]).clone()
                moved[:, 1:] += delta
                return moved if isinstance(out, torch.Tensor) else (moved, *out[1:])

            block = model.hf.model.layers[step.sites[0].layer]
            handle = None if delta is None else block.register_forward_hook(change)
            with torch.no_grad():
                logits = model.hf(torch.tensor([whole])).logits[0, len(ids) - 1 :]
            logs.append(logits.log_softmax(-1))
            if handle:
                handle.remove()
        means.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1)[: len(whole) - len(ids) + 1])
    return sum(one.mean().item() for one in means) / len(means)


def test_every_line_has_the_same_kl(tiny, tuned):
    table = tuned.table.set_index("line")
    added = table[table.index.str.startswith("add")]
    assert len(added) == 4 and set(added["outcome"]) == {"ok"}
    assert ((added["kl"] / 0.02 - 1).abs() <= 0.1).all()
    for _, row in added.iterrows():
        (step,) = parse(row["steer"], KNOWN)
        assert step.unit == ""
        by_hand = kl_by_hugging_face(tiny, step, PROMPTS, 6)
        assert row["kl"] == pytest.approx(by_hand, rel=2e-2)
        assert row["kl_p95"] >= row["kl"]
        held_out = kl_by_hugging_face(tiny, step, HELD_OUT, 6)
        assert row["held_out"] == pytest.approx(held_out, rel=2e-2)
        assert row["low"] <= row["held_out"] <= row["high"] and row["n"] == len(HELD_OUT)
    assert set(tuned.lines) >= set(added["steer"])
    turned = table.loc["rotate(d, e, ? deg) at 2"]
    assert turned["outcome"] == "ok" and turned["unit"] == "deg" and turned["strength"] > 0.9


def test_what_was_run_is_not_run_again(tiny, tmp_path, monkeypatch):
    def of():
        return equal_kl(tiny, "add(d, ? dose) at {1,3}", PROMPTS, KNOWN, tmp_path, target=0.02,
                        length=6)  # fmt: skip

    first = of()
    rows = {path: path.read_bytes() for path in tmp_path.rglob("rows.jsonl")}
    assert rows
    again = of()
    assert {path: path.read_bytes() for path in tmp_path.rglob("rows.jsonl")} == rows
    assert first.table.equals(again.table) and first.curves.equals(again.curves)


def test_order_and_company_change_nothing(tiny, tmp_path):
    both = equal_kl(tiny, ["add(e, ? dose) at 3", "add(d, ? dose) at 1"], PROMPTS, KNOWN,
                    tmp_path / "a", target=0.02, length=6)  # fmt: skip
    alone = equal_kl(tiny, "add(d, ? dose) at 1", PROMPTS, KNOWN, tmp_path / "b", target=0.02,
                     length=6)  # fmt: skip
    mine = both.table[both.table["line"] == "add(d, ? dose) at 1"].iloc[0]
    assert mine["strength"] == pytest.approx(alone.table["strength"][0], rel=1e-3)


def test_the_vectors_length_makes_no_difference(tiny, tmp_path):
    """v and 3 v have one direction: equal doses are equal KL."""
    known = {"v": direction(), "w": (direction() * 3).named("w")}
    found = equal_kl(tiny, "add({v,w}, ? dose) at 2", PROMPTS, known, tmp_path, target=0.02,
                     length=6).table  # fmt: skip
    assert found["strength"][0] == pytest.approx(found["strength"][1], rel=1e-4)


@pytest.mark.parametrize(
    ("lines", "more", "expected"),
    [
        ("add(d, 0.2 dose) at 1", {}, "has no strength to be found"),
        ("ablate(d) at 1", {}, "has no strength to be found"),
        ("add(d, ? raw) at 1", {}, "expected one unknown, '. dose' or '. deg'"),
        ("add(d, ?) at 1", {}, "expected one unknown"),
        ("add(x, ? dose) at 1", {}, "unknown direction 'x'"),
        ("add(d, ? dose) at 99", {}, "layers 0-5"),
        ("add(d, ? dose) at 1", {"target": 0}, "above 0, such as 0.2"),
        ("add(d, ? dose) at 1", {"doses": [0.1, -1]}, "expected some above 0"),
        ("add(d, ? dose) at 1", {"batches": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_found_is_refused(tiny, tmp_path, lines, more, expected):
    with pytest.raises(RequestError, match=expected):
        equal_kl(tiny, lines, PROMPTS, KNOWN, tmp_path, **more)


def test_small_doses_do_damage_as_their_square(tiny, tmp_path):
    found = equal_kl(tiny, "add(d, ? dose) at 2", PROMPTS, KNOWN, tmp_path, target=5.0, length=6,
                     doses=[0.02, 0.04, 0.08], batches=1).curves  # fmt: skip
    slopes = torch.tensor(found["kl"].tolist()).log().diff() / torch.tensor(2.0).log()
    assert slopes.tolist() == pytest.approx([2, 2], abs=0.1)
