"""Chunks: what is recorded of a row, how a chunk is halved, and what a mapper gives back."""

from dataclasses import replace

import pytest
import torch

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row, Sampling
from interp_steer.errors import RunError
from interp_steer.prompts.item import Item
from interp_steer.steering.grammar import parse
from interp_steer.study.cell import Controls
from interp_steer.study.chunk import Chunk, Local, kind, measure
from interp_steer.study.metrics import METRICS, metric
from tests.study.samples import direction, study

SHORT = Sampling(max_new_tokens=3)
PROMPTS = ("Name the fox", "I love the rain, happy and sad", "I hate the tower")


def chunk(*steers, metrics=("length",), unsteered=None, **changes):
    """A row for each line of interventions, on the prompts in turn."""
    known = {"d": direction(), "z": direction()}
    items = tuple(Item(PROMPTS[n % len(PROMPTS)]) for n in range(len(steers)))
    pairs = zip(items, steers, strict=True)
    given = {
        "keys": tuple(f"k{n}" for n in range(len(steers))),
        "rows": tuple(Row(i.prompt, parse(s, known) if s else (), SHORT) for i, s in pairs),
        "items": items,
        "about": tuple({"number": n} for n in range(len(steers))),
        "unsteered": unsteered or (None,) * len(steers),
        "metrics": metrics,
    }
    return Chunk(**{**given, **changes})


def test_halves_hold_every_row_once_down_to_single_ones():
    whole = chunk(*["add(d, 1) at 1"] * 5)
    assert [half.keys for half in whole.halves()] == [("k0", "k1", "k2"), ("k3", "k4")]
    parts = [whole]
    while any(len(part) > 1 for part in parts):
        parts = [half for part in parts for half in (part.halves() if len(part) > 1 else [part])]
    for n, part in enumerate(parts):
        assert not part.whole and part.metrics == whole.metrics
        for name in ("keys", "rows", "items", "about", "unsteered"):
            assert getattr(part, name) == getattr(whole, name)[n : n + 1]
    assert len(parts) == 5 and whole.whole


def test_the_id_is_of_the_rows_in_their_order_and_of_the_metrics():
    made = chunk("", "add(d, 1) at 1")
    others = [
        replace(made, keys=made.keys[::-1]), made.part(0, 1), replace(made, metrics=("rep3",)),
    ]  # fmt: skip
    assert len({made.id, *(other.id for other in others)}) == 4
    assert replace(made, about=({}, {})).id == made.id


def test_items_of_one_kind_are_asked_the_same_metrics():
    items = [
        Item("a"), Item("b"), Item("a", positive="x", negative="y"), Item("a", continuation="x"),
        Item("a", choices=("x", "y"), correct=0), Item("c", choices=("x", "y"), correct=1),
    ]  # fmt: skip
    for item in items:
        for other in items:
            same = all(m.applies(item) == m.applies(other) for m in METRICS.values())
            assert (kind(item) == kind(other)) == same


def test_a_record_holds_what_the_row_alone_gives(tiny):
    made = chunk("add(d, 3) at 1", "", "ablate(d) at 2", metrics=("length", "loss"))
    records = measure(Engine(tiny), made)
    for record, row in zip(records, made.rows, strict=True):
        (alone,) = Engine(tiny).generate([row])
        assert record["text"] == alone.text and record["token_ids"] == list(alone.token_ids)
        assert record["metrics"] == {"length": len(alone.token_ids), "loss": None}
        assert (record["tokens"], record["finish"]) == (len(alone.token_ids), alone.finish)
    assert [(r["key"], r["number"]) for r in records] == [("k0", 0), ("k1", 1), ("k2", 2)]
    assert [r["delta"] for r in records[:2]] == [pytest.approx(3.0), 0.0]


def test_text_is_generated_only_if_a_metric_needs_it(tiny):
    answers = ((5, 6), (7,))
    steers = ("add(d, 9) at 1", "add(d, 9) at 2")
    records = measure(Engine(tiny), chunk(*steers, metrics=("kl_mean",), unsteered=answers))
    assert [record["text"] for record in records] == [None, None]
    assert all(record["metrics"]["kl_mean"] > 0 for record in records)
    # a row whose unsteered answer failed has no number; its neighbour keeps its own
    (first, second) = measure(
        Engine(tiny), chunk(*steers, metrics=("kl_mean",), unsteered=(answers[0], None))
    )
    assert first["metrics"]["kl_mean"] == pytest.approx(records[0]["metrics"]["kl_mean"], abs=1e-5)
    assert second["metrics"]["kl_mean"] is None


def test_the_step_of_an_ablation_is_the_mean_over_the_steered_positions(tiny):
    """Against hidden states of the Hugging Face model; two prompts of different length."""
    records = measure(Engine(tiny), chunk("ablate(d) at 2", "ablate(d) at 2"))
    for record, prompt in zip(records, PROMPTS, strict=False):
        ids = tiny.encode(prompt).ids
        with torch.no_grad():
            x = tiny.hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[3][0]
        components = (x @ direction().unit).abs()[1:]  # the first position is left alone
        assert record["delta"] == pytest.approx(components.mean().item(), rel=1e-4)


def test_a_metric_that_has_changed_measures_nothing(tiny):
    made = chunk("", meanings=((1, "of another file"),))
    with pytest.raises(RunError, match="length is another one here than where the study began"):
        measure(Engine(tiny), made)
    assert measure(Engine(tiny), replace(made, meanings=((1, ""),)))


def test_a_chunk_that_fails_is_given_back_and_the_others_run(tiny):
    @metric("touchy")
    def touchy(measured):
        if "tower" in measured.items[0].text:
            raise ValueError("no towers")
        return [1.0] * len(measured.rows)

    try:
        whole = chunk("", "", "", metrics=("touchy",))
        given = [whole.part(n, n + 1) for n in (2, 0, 1)]
        outcomes = list(Local(Engine(tiny))(given))
    finally:
        del METRICS["touchy"]
    assert [made for made, _ in outcomes] == given
    assert isinstance(outcomes[0][1], ValueError)
    assert [outcome[0]["key"] for _, outcome in outcomes[1:]] == ["k0", "k1"]


def test_the_step_of_a_clamp_is_measured(tiny, tmp_path):
    made = study(
        operators=["clamp"], metrics=["length"], choose_by="length", coefficients=[5.0],
        sites=[2], choose=[], controls=Controls(0, 0, 0, flip=False, wrong_layer=False),
        prove=["Name the fox, please"], as_chat=False,
    )  # fmt: skip
    row = made.run(tiny, tmp_path / "r").table().query("role == 'chosen'").iloc[0]
    ids = tiny.encode("Name the fox, please").ids
    with torch.no_grad():
        x = tiny.hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[3][0]
    steps = (5.0 - x @ direction().unit).abs()[1:]  # the first position is left alone
    assert row["delta"] == pytest.approx(steps.mean().item(), rel=1e-4)
