"""Rows that come and go in one batch: slots, shelves, and steps that are all or nothing."""

import random

import pytest
import torch

from interp_steer.engine.decoding import Decoding
from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Result, Row, Sampling
from interp_steer.engine.stepper import Event
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.steering.direction import Direction
from interp_steer.steering.grammar import parse
from tests.conftest import make_llama
from tests.fakegpu import fail_at

LINES = (
    "",
    "add(one, 6) at 2",
    "add_norm_kept(one, 5) at 1 on generated",
    "clamp(one, 3) at 0-5 on positions 2-30",
    "clamp_min(one, 4) at resid_pre 3; add(two, 2) at mlp_out 1 on prompt",
    "ablate(one) at attn_out 1-4 on all+first",
    "rotate(one, two, 40 deg) at 2 on last",
    "angular(one, two, 30 deg) at 4 on content",
    "add(head, 2) at z 1h1 on generated; clamp(one, 1) at 3; clamp(two, 2) at 3",
)
LENGTHS = (1, 9, 150, 500)


@pytest.fixture(scope="module")
def engine(tiny_folder) -> Engine:
    return Engine(SteeringModel.load(str(tiny_folder)))


@pytest.fixture(scope="module")
def directions(engine) -> dict[str, Direction]:
    draw = torch.Generator().manual_seed(3)
    made = {
        name: Direction.of(torch.randn(64, generator=draw), "blocks.2.hook_resid_post", name)
        for name in ("one", "two")
    }
    head = Direction.of(torch.randn(24, generator=draw), "blocks.1.attn.hook_z.0", "head")
    return {**made, "head": head}


def prompt(engine: Engine, tokens: int) -> str:
    """A text of so many tokens, the beginning included."""
    text = "" if tokens == 1 else "x"
    while len(engine.model.encode(text or "<|begin|>").ids) < tokens:
        text += random.Random(len(text)).choice("abcdefgh ")
    return text or "<|begin|>"


def rows_of(engine: Engine, directions, new: int = 5) -> list[Row]:
    hot = Sampling(max_new_tokens=new, temperature=0.9, top_p=0.95, repetition_penalty=1.2)
    found = []
    for n, length in enumerate(LENGTHS):
        for m, text in enumerate(LINES):
            sampling = hot if (n + m) % 3 == 0 else Sampling(max_new_tokens=new + m % 3)
            found.append(Row(prompt(engine, length), parse(text, directions), sampling, seed=m))
    return found


def run(stepper, at: dict[int, list[Row]]) -> dict[int, tuple[int, ...]]:
    """Token ids of rows that are added before the steps with these numbers."""
    ids, step = {}, 0
    while stepper.busy or any(n >= step for n in at):
        for row in at.get(step, ()):
            ids[stepper.add(row)] = row
        stepper.step()
        step += 1
    return {id: stepper.pop(id).token_ids for id in ids}


def parted(engine: Engine, row: Row, mine: tuple[int, ...], other: tuple[int, ...]) -> float:
    """The gap between two candidates' scores where texts part; 0 if they do not."""
    at = next((i for i, (x, y) in enumerate(zip(mine, other, strict=False)) if x != y), None)
    if at is None:
        return 0.0 if len(mine) == len(other) else float("inf")
    logits = engine.score([row], [mine[:at]], last_logits=True)[0].last_logits
    return float((logits[mine[at]] - logits[other[at]]).abs())


def test_a_mixed_batch_is_single_rows(engine, directions):
    """Lengths 1 to 500, every operator and scope, rows coming and going."""
    rows = rows_of(engine, directions)
    random.Random(0).shuffle(rows)
    at: dict[int, list[Row]] = {}
    for n, row in enumerate(rows):
        at.setdefault(n % 5 * 2, []).append(row)
    together = list(run(engine.stepper(), at).values())
    order = [row for step in sorted(at) for row in at[step]]
    alone = [engine.generate([row])[0].token_ids for row in order]
    apart = [(r, x, y) for r, x, y in zip(order, together, alone, strict=True) if x != y]
    assert len(apart) <= 1, len(apart)
    for row, mine, other in apart:
        assert row.sampling.temperature == 0 and parted(engine, row, mine, other) < 2e-3


def test_a_batch_is_read_as_one_row_after_the_other_would_be(engine, directions):
    """Scores of lengths 1 to 500, continuations of 0 to 6 tokens, some of one prompt."""
    rows = rows_of(engine, directions)
    draw = random.Random(1)
    given = [[draw.randrange(300) for _ in range(draw.choice((0, 1, 2, 6)))] for _ in rows]
    together = engine.score(rows, given, last_logits=True, taps=[Site("resid_post", 3)])
    for row, ids, score in zip(rows, given, together, strict=True):
        alone = engine.score([row], [ids], last_logits=True, taps=[Site("resid_post", 3)])[0]
        assert torch.allclose(score.last_logits, alone.last_logits, atol=1e-3)
        assert torch.allclose(score.logprobs, alone.logprobs, atol=1e-3)
        (mine,), (other,) = score.taps.values(), alone.taps.values()
        assert mine.shape == other.shape and torch.allclose(mine, other, atol=1e-3)


def cache_bytes(decoding: Decoding) -> int:
    tensors = [t for shelf in decoding.shelves for layer in shelf.layers for t in layer]
    return sum(t.untyped_storage().nbytes() for t in tensors)


def need(engine: Engine, row: Row) -> int:
    model = engine.model
    tokens = len(model.encode(row.prompt).ids) + row.sampling.max_new_tokens
    return 2 * model.n_layers * model.n_kv_heads * model.d_head * 4 * tokens


def test_a_long_row_makes_no_short_one_long(engine):
    stepper = engine.stepper()
    short = [Row(prompt(engine, 6 + n % 3), (), Sampling(max_new_tokens=20)) for n in range(32)]
    for row in short:
        stepper.add(row)
    stepper.step()
    ids = [id(t) for s in stepper._decoding.shelves for layer in s.layers for t in layer]
    long = Row(prompt(engine, 400), (), Sampling(max_new_tokens=20))
    stepper.add(long)
    stepper.step()
    shelves = stepper._decoding.shelves
    needed = sum(need(engine, row) for row in [*short, long])
    assert needed <= cache_bytes(stepper._decoding) <= 1.2 * needed
    assert ids == [id(t) for s in shelves[:-1] for layer in s.layers for t in layer]


def test_short_rows_do_not_sit_down_on_a_long_rows_shelf(engine):
    stepper = engine.stepper()
    long = Row(prompt(engine, 400), (), Sampling(max_new_tokens=20))
    rows = [long, *[Row(prompt(engine, 6), (), Sampling(max_new_tokens=20))] * 16]
    for row in rows:
        stepper.add(row)
        stepper.step()
    needed = sum(need(engine, row) for row in rows)
    assert needed <= cache_bytes(stepper._decoding) <= 1.5 * needed


def test_leaving_frees_and_joining_fills(engine):
    lengths = (2, 30, 2, 30, 2, 2, 2, 30)
    rows = [Row(prompt(engine, 7), (), Sampling(max_new_tokens=n), seed=n) for n in lengths]
    expected = [engine.generate([row])[0].token_ids for row in rows]
    stepper = engine.stepper()
    ids = [stepper.add(row) for row in rows]
    stepper.step()
    decoding = stepper._decoding
    assert cache_bytes(decoding) <= 1.01 * sum(need(engine, row) for row in rows)
    for _ in range(4):
        stepper.step()
    assert cache_bytes(decoding) == sum(need(engine, row) for row in rows if row.seed == 30)
    late = [stepper.add(row) for row in rows[:5]]
    while stepper.busy:
        stepper.step()
    assert [stepper.pop(id).token_ids for id in ids] == expected
    assert [stepper.pop(id).token_ids for id in late] == expected[:5]
    assert not stepper.busy


def test_numbers_that_are_none_do_not_outlive_their_row(tiny_folder, directions):
    """A row whose keys overflowed leaves; another takes its slots, which are fewer."""
    engine = Engine(SteeringModel.load(str(tiny_folder), dtype="float16"))
    huge = parse("add(one, 1e9) at 1 on positions 30-60", directions)
    sampling = Sampling(max_new_tokens=30)
    broken = Row(prompt(engine, 20), huge, sampling)
    stays = Row(prompt(engine, 21), (), Sampling(max_new_tokens=45))
    late = Row(prompt(engine, 18), (), Sampling(max_new_tokens=32))
    expected = engine.generate([late])[0].token_ids
    stepper = engine.stepper()
    for _ in range(3):  # enough to stay: nobody moves into the place, and no memory is given back
        stepper.add(stays)
    first = stepper.add(broken)
    while not any(event.id == first and event.finish for event in stepper.step()):
        pass
    assert stepper.pop(first).finish == "overflow"
    second = stepper.add(late)
    stepper.step()
    assert len({len(shelf.seats) for shelf in stepper._decoding.shelves}) == 1
    while stepper.busy:
        stepper.step()
    assert stepper.pop(second).token_ids == expected


# --- all or nothing ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Engine:
    folder = make_llama(tmp_path_factory.mktemp("small"), num_hidden_layers=2)
    return Engine(SteeringModel.load(str(folder)))


def stepped(engine: Engine, directions, fails: fail_at) -> list[Result]:
    """Four rows, and two more at the third step; a step that fails is made again."""
    sampling = Sampling(max_new_tokens=3, temperature=0.8, repetition_penalty=1.2, top_k=20)
    texts = (
        "add(one, 6) at 1",
        "",
        "clamp(one, 3) at 0-1 on generated",
        "",
        "ablate(one) at 0",
        "",
    )
    rows = [
        Row(prompt(engine, 5 + 3 * n), parse(text, directions), sampling, seed=n)
        for n, text in enumerate(texts)
    ]
    coming, stepper, ids, step = {0: rows[:4], 2: rows[4:]}, engine.stepper(), [], 0
    while stepper.busy or coming:
        ids += [stepper.add(row, [Site("mlp_out", 1)]) for row in coming.pop(step, ())]
        with fails:
            try:
                stepper.step()
                step += 1
            except torch.OutOfMemoryError:
                pass
    return [stepper.pop(id) for id in ids]


def all_or_nothing(engine: Engine, directions, every: int) -> None:
    counting = fail_at()
    expected = stepped(engine, directions, counting)
    assert counting.count > 300
    for at in range(1, counting.count + 1, every):
        fails = fail_at(at)
        for mine, other in zip(stepped(engine, directions, fails), expected, strict=True):
            assert mine.token_ids == other.token_ids, at
            assert mine.finish == other.finish
            assert torch.allclose(*(x.taps[Site("mlp_out", 1)] for x in (mine, other)), atol=1e-4)
        assert fails.count >= at


def test_a_step_that_fails_changes_nothing(small, directions):
    """Memory that runs out once, at some of the allocations of a run."""
    all_or_nothing(small, directions, 41)


@pytest.mark.slow
def test_a_step_that_fails_anywhere_changes_nothing(small, directions):
    all_or_nothing(small, directions, 1)


def test_a_row_that_never_fits_is_told_of(engine):
    """It waits while others run, whose texts it does not change, and ends alone."""
    rows = [Row(prompt(engine, 6), (), Sampling(max_new_tokens=n), seed=n) for n in (3, 6)]
    expected = [engine.generate([row])[0].token_ids for row in rows]
    stepper = engine.stepper()
    ids = [stepper.add(row) for row in rows]
    stepper.step()
    large = stepper.add(Row(prompt(engine, 450), (), Sampling(max_new_tokens=20)))
    last = stepper.add(rows[0])
    events = []
    with fail_at(largest=60_000):
        while stepper.busy:
            events += stepper.step()
    assert [stepper.pop(id).token_ids for id in ids] == expected
    assert [event for event in events if event.id == large] == [Event(large, None, "memory")]
    assert stepper.pop(large).token_ids == () and stepper.pop(last).token_ids == expected[0]


def test_a_row_that_moves_takes_its_prompts_last_keys_along(engine, directions):
    """Rows that share a prompt read its last token apart; three leave at once, the fourth moves."""
    rows = []
    for c, new in ((3, 1), (4, 1), (5, 1), (6, 6)):
        steering = parse(f"add(one, {c}) at 2 on generated", directions)
        rows.append(Row(prompt(engine, 9), steering, Sampling(max_new_tokens=new)))
    site = Site("resid_post", 5)
    alone = engine.generate(rows[3:], taps=[site])[0].taps[site]
    together = engine.generate(rows, taps=[site])[3].taps[site]
    assert torch.allclose(together, alone, atol=1e-4)


def test_rows_that_wait_in_their_last_slot_turn_nobody(engine):
    """An ended row's position goes on; the others' angles must not be taken from it."""
    short = Row(prompt(engine, 5), (), Sampling(max_new_tokens=5))
    others = [Row(prompt(engine, 3), (), Sampling(max_new_tokens=40), seed=n) for n in range(5)]
    expected = [engine.generate([row])[0].token_ids for row in others]
    stepper = engine.stepper()
    stepper.add(short)
    stepper.step()
    ids = [stepper.add(row) for row in others]
    while stepper.busy:
        stepper.step()
    assert [stepper.pop(id).token_ids for id in ids] == expected


def test_rows_that_do_not_fit_leave_no_memory_behind(engine):
    """Layers of the cache that had grown already are given back."""
    stepper = engine.stepper()
    for n in range(4):
        stepper.add(Row(prompt(engine, 6), (), Sampling(max_new_tokens=20), seed=n))
    stepper.step()
    before = cache_bytes(stepper._decoding)
    for n in range(12):
        stepper.add(Row(prompt(engine, 6), (), Sampling(max_new_tokens=20), seed=n))
    grown, tensors = 0, stepper._decoding.shelves[0].layers

    class Full(fail_at):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal grown
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if isinstance(out, torch.Tensor) and out.shape[1:] == tensors[0][0].shape[1:]:
                grown += len(out) > 4
                if grown > 5 and len(out) > 4:
                    raise torch.OutOfMemoryError("out of memory, as a test wants it")
            return out

    with Full():
        stepper.step()
    assert grown > 5 and cache_bytes(stepper._decoding) == before


def test_a_gate_that_memory_does_not_suffice_for_stops_no_row(engine, directions):
    stepper = engine.stepper()
    row = Row(prompt(engine, 6), (), Sampling(max_new_tokens=4))
    first = stepper.add(row)
    stepper.step()
    gated = parse("add(one, 4) at 1 if cos(two, 2) > 0", directions)
    late = stepper.add(Row(prompt(engine, 450), gated, Sampling(max_new_tokens=4)))
    with fail_at(largest=20_000):
        while stepper.busy:
            stepper.step()
    assert stepper.pop(first).token_ids == engine.generate([row])[0].token_ids
    assert stepper.pop(late).finish == "memory"
