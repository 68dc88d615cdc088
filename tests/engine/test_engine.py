"""Many differently steered rows in one batch, against each row alone, plain Hugging Face hooks,
`transformers.generate` and TransformerLens.
"""

import itertools

import pytest
import torch

from interp_steer.engine import hooks
from interp_steer.engine.decoding import Decoding
from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row, Sampling, record
from interp_steer.engine.sampler import Sampler
from interp_steer.engine.stepper import Stepper
from interp_steer.errors import RequestError, RunError
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.prompts.prompt import chat
from interp_steer.steering.direction import Direction, DirectionSet
from interp_steer.steering.grammar import parse, steer
from interp_steer.steering.intervention import line
from tests.conftest import state
from tests.engine import samples
from tests.engine.samples import LINES, PROMPTS


@pytest.fixture(scope="module")
def directions() -> dict[str, Direction | DirectionSet]:
    return samples.directions()


@pytest.fixture(scope="module")
def rows(directions) -> list[Row]:
    sampling = Sampling(max_new_tokens=10)
    return [Row(p, parse(text, directions), sampling) for p in PROMPTS for text in LINES]


@pytest.fixture(scope="module")
def engine(tiny: SteeringModel) -> Engine:
    return Engine(tiny)


@pytest.fixture(scope="module")
def answers(engine: Engine, rows: list[Row]) -> list[tuple[int, ...]]:
    return [result.token_ids for result in engine.generate(rows)]


def last_logits(engine, rows, answers):
    return torch.stack([s.last_logits for s in engine.score(rows, answers, last_logits=True)])


def test_rows_differ_at_all(answers):
    assert len(set(answers[: len(LINES)])) > len(LINES) // 2


def test_batched_logits_equal_single_logits(engine, rows, answers):
    together = last_logits(engine, rows, answers)
    for row, answer, logits in zip(rows, answers, together, strict=True):
        alone = last_logits(engine, [row], [answer])[0]
        assert (alone - logits).abs().max() < 1e-3, line(row.steer)


def test_every_row_equals_transformerlens(tiny, engine, rows, answers):
    for row, answer, logits in zip(rows, answers, last_logits(engine, rows, answers), strict=True):
        reference = hooks.score(tiny, row, answer)
        assert (reference.last_logits - logits).abs().max() < 1e-3, line(row.steer)


@pytest.mark.parametrize("sampling", [
    Sampling(max_new_tokens=12),
    Sampling(temperature=0.9, top_p=0.95, top_k=40, repetition_penalty=1.2, max_new_tokens=12),
])  # fmt: skip
def test_texts_alone_and_batched_are_equal_or_part_at_a_near_tie(engine, rows, sampling):
    rows = [Row(r.prompt, r.steer, sampling, seed) for seed, r in enumerate(rows)]
    together = engine.generate(rows)
    for row, result in zip(rows, together, strict=True):
        alone = engine.generate([row])[0].token_ids
        if alone != result.token_ids:
            assert gap_where_they_part(engine, row, alone, result.token_ids) < 2e-3


def gap_where_they_part(engine: Engine, row: Row, one, other) -> float:
    """Difference of the two candidates' scores at the first token that differs."""
    at = next(i for i, (a, b) in enumerate(itertools.zip_longest(one, other)) if a != b)
    stop = engine.model.stop_ids[0]
    pair = [ids[at] if at < len(ids) else stop for ids in (one, other)]
    logits = last_logits(engine, [row], [one[:at]])
    seen = torch.zeros(1, engine.model.d_vocab, dtype=torch.bool)
    seen[0, [*engine.model.encode(row.prompt).ids, *one[:at]]] = True
    sampler = Sampler([row.sampling], [row.seed], seen, torch.device("cpu"))
    scores = sampler.scores(logits, torch.tensor([at]))[0]
    return float((scores[pair[0]] - scores[pair[1]]).abs())


def test_unsteered_greedy_text_is_that_of_transformers(tiny, engine):
    for prompt in PROMPTS:
        ids = torch.tensor([tiny.encode(prompt).ids])
        with torch.no_grad():
            theirs = tiny.hf.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
                repetition_penalty=1.3, pad_token_id=0,
            )[0, ids.shape[1] :].tolist()  # fmt: skip
        mine = engine.generate(
            [Row(prompt, (), Sampling(repetition_penalty=1.3, max_new_tokens=24))]
        )
        theirs = theirs[:-1] if theirs[-1] in tiny.stop_ids else theirs
        assert list(mine[0].token_ids) == theirs


def test_steered_cached_decoding_is_that_of_transformerlens_generate(tiny, engine, directions):
    for text in LINES[:12]:
        setting = parse(text, directions)
        ids = torch.tensor([tiny.encode(PROMPTS[1]).ids])
        made = hooks.fwd_hooks(tiny, setting, PROMPTS[1], cached=True)
        with tiny.hooked.hooks(fwd_hooks=made):
            theirs = tiny.hooked.generate(
                ids, max_new_tokens=12, do_sample=False, verbose=False, prepend_bos=False,
                stop_at_eos=False,
            )[0, ids.shape[1] :].tolist()  # fmt: skip
        end = next((i for i, token in enumerate(theirs) if token in tiny.stop_ids), 12)
        mine = engine.generate([Row(PROMPTS[1], setting, Sampling(max_new_tokens=12))])[0]
        assert list(mine.token_ids) == theirs[:end], text
        assert mine.finish == ("stop" if end < 12 else "length"), text


def test_add_equals_a_plain_hugging_face_hook(tiny, engine, directions):
    """No code of ours on the other side: a forward hook on a left-padded batch."""
    vectors = [4 * directions["one"].unit, -3 * directions["two"].unit]
    encoded = [tiny.encode(p).ids for p in PROMPTS[:2]]
    longest = max(map(len, encoded))
    ids = torch.tensor([[0] * (longest - len(e)) + list(e) for e in encoded])
    mask = torch.tensor([[0] * (longest - len(e)) + [1] * len(e) for e in encoded])
    first = (mask.cumsum(-1) == 1) & mask.bool()
    shift = torch.stack(vectors)[:, None] * (mask.bool() & ~first)[..., None]
    handle = tiny.hf.model.layers[2].register_forward_hook(lambda _m, _i, out: out + shift)
    try:
        with torch.no_grad():
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            logits = tiny.hf(ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    finally:
        handle.remove()
    rows = [
        Row(PROMPTS[0], (steer("add", directions["one"], coefficient=4, at=2),)),
        Row(PROMPTS[1], (steer("add", directions["two"], coefficient=-3, at=2),)),
    ]
    assert torch.allclose(last_logits(engine, rows, [(), ()]), logits, atol=1e-4)


@pytest.mark.parametrize("text", [
    "add(one, 0) at 2", "add_norm_kept(one, 0) at 0-5", "rotate(one, two, 0 deg) at 3",
    "add(one, 0) at attn_out 1 + mlp_out 2", "add(head, 0) at z 0h1",
])  # fmt: skip
def test_zero_strength_is_the_unsteered_model_to_the_bit(engine, directions, text):
    plain = last_logits(engine, [Row(PROMPTS[1])], [()])
    idle = last_logits(engine, [Row(PROMPTS[1], parse(text, directions))], [()])
    assert torch.equal(plain, idle)


def test_an_unsteered_row_does_not_feel_its_steered_neighbours(engine, rows):
    row = Row(PROMPTS[0], (), Sampling(temperature=1.0, max_new_tokens=16), seed=3)
    alone = engine.generate([row])[0].token_ids
    strong = [Row(r.prompt, r.steer, row.sampling, seed=9) for r in rows]
    assert engine.generate([*strong, row])[-1].token_ids == alone


def test_the_same_batch_twice_is_bit_equal(engine, rows, answers):
    assert torch.equal(last_logits(engine, rows, answers), last_logits(engine, rows, answers))


@pytest.fixture
def blocks(monkeypatch) -> list[tuple[int, int, int]]:
    """(layer, rows, positions) of every block that is run from here on."""
    seen: list[tuple[int, int, int]] = []
    block = SteeringModel.block

    def watched(self, layer, x, *rest, **more):
        seen.append((layer, x.shape[0], x.shape[1]))
        return block(self, layer, x, *rest, **more)

    monkeypatch.setattr(SteeringModel, "block", watched)
    return seen


def test_shared_prefill_computes_each_prompt_once(engine, directions, blocks):
    """Rows of one prompt that are steered at block 3 run blocks 0-3 as one row."""
    one = directions["one"]
    rows = [Row(PROMPTS[0], (steer("add", one, coefficient=c, at=3),)) for c in range(8)]
    engine.score(rows, [()] * 8)
    assert [size for _, size, _ in blocks] == [1, 1, 1, 1, 8, 8]


def test_rows_that_differ_by_their_seed_are_read_once(engine, directions, blocks):
    one, other = (
        (
            steer("add", directions["one"], coefficient=c, at=[Site("attn_out", 1)]),
            steer("clamp", directions["one"], coefficient=c, at=3),
        )
        for c in (3, 4)
    )
    hot = Sampling(max_new_tokens=3, temperature=1.0)
    rows = [Row(PROMPTS[0], s, hot, seed) for seed in range(4) for s in (one, other)]
    together = engine.generate(rows)
    assert [size for _, size, n in blocks if n > 1] == [1, *[2] * 5]
    alone = [engine.generate([row])[0].token_ids for row in rows]
    assert [result.token_ids for result in together] == alone
    assert len({*alone}) > 4


def test_one_sequence_divided_in_two_ways_is_two_rows(tiny, engine, directions):
    """Where the prompt ends decides what scope `generated` covers."""
    setting = (steer("add", directions["one"], coefficient=6, at=2, on="generated"),)
    short, long = "The tower stands", "The tower stands in the rain"
    first, whole = tiny.encode(short).ids, (*tiny.encode(long).ids, 7, 8, 9)
    assert whole[: len(first)] == first
    cases = [(Row(short, setting), whole[len(first) :]), (Row(long, setting), (7, 8, 9))]
    rows, given = [row for row, _ in cases], [after for _, after in cases]
    together = engine.score(rows, given, last_logits=True)
    for (row, after), score in zip(cases, together, strict=True):
        alone = engine.score([row], [after], last_logits=True)[0]
        assert torch.allclose(score.last_logits, alone.last_logits, atol=1e-4)
    assert not torch.allclose(together[0].last_logits, together[1].last_logits, atol=1e-2)


@pytest.mark.parametrize("scores", [False, True])
def test_late_rows_share_the_whole_prompt(tiny, engine, directions, blocks, scores):
    """Read once but for the last position, whether an answer is generated or given."""
    settings = [
        (steer("add", directions["one"], coefficient=c, at=1, on="generated"),) for c in range(1, 6)
    ]
    rows = [Row(PROMPTS[1], setting, Sampling(max_new_tokens=1)) for setting in settings]
    length = len(tiny.encode(PROMPTS[1]).ids)
    if scores:
        engine.score(rows, [(5, 6)] * 5)
    else:
        engine.generate(rows)
    new = 3 if scores else 1
    shared = 2 * new + (tiny.n_layers - 2) * 5 * new  # of the rest, before block 2 and after
    assert sum(size * n for _, size, n in blocks) == tiny.n_layers * (length - 1) + shared


def test_continuations_of_one_prompt_share_it(tiny, engine, directions, blocks):
    """Also where the prompt itself is steered."""
    setting = (steer("add", directions["one"], coefficient=3, at=1),)
    given = [(5, 6), (7,), (), (8, 9, 10)]
    together = engine.score([Row(PROMPTS[1], setting)] * 4, given, last_logits=True)
    length = len(tiny.encode(PROMPTS[1]).ids)
    assert sum(size * n for _, size, n in blocks if n > 4) == tiny.n_layers * (length - 1)
    for ids, score in zip(given, together, strict=True):
        alone = engine.score([Row(PROMPTS[1], setting)], [ids], last_logits=True)[0]
        assert torch.allclose(score.last_logits, alone.last_logits, atol=1e-4)
        assert torch.allclose(score.logprobs, alone.logprobs, atol=1e-4)


BEGINNING = "It was a dark night in the old town, and the rain fell on the roofs of the houses. "


@pytest.mark.parametrize("scope", ["all", "prompt", "positions 2-5", "positions 2-40"])
def test_prompts_that_begin_alike_share_their_beginning(tiny, engine, directions, blocks, scope):
    """Each steering reads it once; what is steered after it, or before it, stays as it is alone."""
    ends = ("The fox", "The lazy dog sat", "A", "Who?", "He said no", "Rain!")
    settings = [(steer("add", directions["one"], coefficient=c, at=1, on=scope),) for c in (3, -4)]
    rows = [
        Row(BEGINNING + end, setting, Sampling(max_new_tokens=6)) for setting in settings
        for end in ends
    ]  # fmt: skip
    lengths = [len(tiny.encode(row.prompt).ids) for row in rows]
    together = engine.score(rows, [()] * len(rows), last_logits=True, taps=[Site("resid_post", 3)])
    first = [size for layer, size, _ in blocks if layer == 3]
    assert first == [2, 12]  # the beginning, then the ends
    assert sum(n for layer, _, n in blocks if layer == 3) == max(lengths)
    texts = [result.token_ids for result in engine.generate(rows)]
    for row, length, score, text in zip(rows, lengths, together, texts, strict=True):
        alone = engine.score([row], [()], last_logits=True, taps=[Site("resid_post", 3)])[0]
        assert torch.allclose(score.last_logits, alone.last_logits, atol=1e-4)
        stream, reference = (one.taps[Site("resid_post", 3)] for one in (score, alone))
        assert len(stream) == length and torch.allclose(stream, reference, atol=1e-4)
        assert text == engine.generate([row])[0].token_ids


def test_what_is_steered_differently_is_not_shared(tiny, engine, directions):
    """The same tokens are content in one prompt, and the template's in another."""
    setting = (steer("add", directions["one"], coefficient=4, at=1, on="content"),)
    chats = [chat(BEGINNING + end) for end in ("The fox", "A", "No")]
    texts = [tiny.encode(one).ids for one in chats]
    prompts = [*chats, *("".join(map(tiny.decode_token, ids)) for ids in texts)]
    rows = [Row(prompt, setting) for prompt in prompts]
    together = engine.score(rows, [()] * len(rows), last_logits=True)
    for row, score in zip(rows, together, strict=True):
        alone = engine.score([row], [()], last_logits=True)[0]
        assert torch.allclose(score.last_logits, alone.last_logits, atol=1e-4)


@pytest.mark.parametrize(
    ("scope", "begin"), [("all", 1), ("generated", -1), ("last", -1), ("all+first", 0)]
)
def test_scope_reaches_these_positions_of_the_prompt(engine, directions, scope, begin):
    site, one = Site("resid_post", 2), directions["one"]
    row = Row(PROMPTS[1], (steer("add", one, coefficient=4, at=[site], on=scope),))
    plain = engine.score([Row(PROMPTS[1])], [()], taps=[site])[0].taps[site]
    moved = engine.score([row], [()], taps=[site])[0].taps[site] - plain
    expected = torch.zeros_like(moved)
    expected[begin:] = 4 * one.unit
    assert torch.allclose(moved, expected, atol=1e-5)


def test_taps_equal_the_transformerlens_cache(tiny, engine, rows):
    sites = [
        Site("resid_pre", 0),
        Site("resid_post", 5),
        Site("attn_out", 2),
        Site("mlp_out", 3),
        Site("z", 4, 2),
    ]
    for result in engine.generate(rows, taps=sites):
        ids = [*tiny.encode(result.row.prompt).ids, *result.token_ids]
        ids = ids if result.finish == "stop" else ids[:-1]
        with (
            torch.no_grad(),
            tiny.hooked.hooks(fwd_hooks=hooks.fwd_hooks(tiny, result.row.steer, result.row.prompt)),
        ):
            _, cache = tiny.hooked.run_with_cache(torch.tensor([ids]))
        for site in sites:
            reference = cache[site.hook_name][0]
            reference = reference if site.head is None else reference[:, site.head]
            assert result.taps[site].shape == reference.shape
            assert torch.allclose(result.taps[site], reference, atol=2e-3), (
                site,
                line(result.row.steer),
            )


def test_run_with_cache_is_steered(tiny, engine, directions):
    setting = (steer("add", directions["one"], coefficient=4, at=2),)
    logits, cache = hooks.run_with_cache(tiny, PROMPTS[0], setting)
    assert torch.allclose(
        logits[0, -1], last_logits(engine, [Row(PROMPTS[0], setting)], [()])[0], atol=1e-3
    )
    with torch.no_grad():
        _, plain = tiny.hooked.run_with_cache(torch.tensor([tiny.encode(PROMPTS[0]).ids]))
    assert torch.equal(cache["blocks.1.hook_resid_post"], plain["blocks.1.hook_resid_post"])
    moved = (cache["blocks.2.hook_resid_post"] - plain["blocks.2.hook_resid_post"])[0]
    assert torch.allclose(moved[1:], 4 * directions["one"].unit.expand_as(moved[1:]), atol=1e-5)
    assert not moved[0].any()


def test_score_gives_logprobs_and_kl(tiny, engine, rows, answers):
    plain = [Row(r.prompt) for r in rows]
    both = engine.score(
        [*plain, *rows], [*answers, *answers],
        reference=[None] * len(rows) + list(range(len(rows))), batch=7,
    )  # fmt: skip
    for row, answer, mine in zip(rows, answers, both[len(rows) :], strict=True):
        ids = tiny.encode(row.prompt).ids
        tokens = torch.tensor([[*ids, *answer]])
        with torch.no_grad():
            p = tiny.hf(tokens).logits[0, len(ids) - 1 :].log_softmax(-1)
            with tiny.hooked.hooks(fwd_hooks=hooks.fwd_hooks(tiny, row.steer, row.prompt)):
                q = tiny.hooked(tokens)[0, len(ids) - 1 :].log_softmax(-1)
        kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        assert mine.kl.shape == (len(answer) + 1,)
        assert torch.allclose(mine.kl, kl, atol=1e-3)
        expected = q[:-1].gather(1, torch.tensor([answer]).T)[:, 0] if answer else torch.zeros(0)
        assert torch.allclose(mine.logprobs, expected, atol=1e-3)


def test_a_reference_may_have_another_prompt(engine, tiny):
    """The same answer, asked for in two ways."""
    rows = [Row(PROMPTS[0]), Row(PROMPTS[1])]
    answer = (5, 6, 7)
    _, mine = engine.score(rows, [answer] * 2, reference=[None, 0])
    logs = []
    for row in rows:
        ids = tiny.encode(row.prompt).ids
        with torch.no_grad():
            logits = tiny.hf(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 :]
        logs.append(logits.log_softmax(-1))
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    assert torch.allclose(mine.kl, kl, atol=1e-4) and kl.min() > 1e-3


def test_a_reference_of_other_tokens_is_refused(engine):
    with pytest.raises(RequestError, match="different continuations"):
        engine.score([Row(PROMPTS[0])] * 2, [(1, 2), (3,)], reference=[None, 0])
    for wrong in ([None], [None, 2], [-1, None]):
        with pytest.raises(RequestError, match="row number 0-1"):
            engine.score([Row(PROMPTS[0])] * 2, [(), ()], reference=wrong)


def test_a_reference_may_have_a_reference_of_its_own(engine, tiny):
    from transformers import LlamaForCausalLM

    assert isinstance(tiny.hf, LlamaForCausalLM)
    vector = torch.randn(64, generator=torch.Generator().manual_seed(8))
    known = {"d": Direction.of(vector, "blocks.3.hook_resid_post", "d")}
    lines = [f"add(d, {c}) at 3" for c in (2.0, 5.0, 9.0)]
    rows = [Row(PROMPTS[0]), *(Row(PROMPTS[0], parse(text, known)) for text in lines)]
    after = (5, 7, 11)
    ids = torch.tensor([[*tiny.encode(PROMPTS[0]).ids, *after]])
    logits = []
    for coefficient in (0.0, 2.0, 5.0, 9.0):  # the steering of transformers alone
        step = coefficient * known["d"].unit

        def add(_m, _i, out, step=step):
            stream = (out[0] if isinstance(out, tuple) else out).clone()
            stream[:, 1:] += step
            return (stream, *out[1:]) if isinstance(out, tuple) else stream

        hook = tiny.hf.model.layers[3].register_forward_hook(add)
        with torch.no_grad():
            logits.append(tiny.hf(ids).logits[0, -len(after) - 1 :].log_softmax(-1))
        hook.remove()

    # a chain in both directions, a pair that are each other's, and one that is its own
    for reference in ([None, 0, 1, 2], [1, 2, 3, None], [1, 0, 3, 2], [0, 0, 1, 2]):
        for batch in (1, 2, 4):
            found = engine.score(rows, [after] * 4, reference=reference, batch=batch)
            for mine, other in enumerate(reference):
                if other is None:
                    assert found[mine].kl is None
                    continue
                p, q = logits[other], logits[mine]
                expected = (p.exp() * (p - q)).sum(-1)
                assert torch.allclose(found[mine].kl, expected, atol=1e-4), (reference, batch)


# --- the stepper ---------------------------------------------------------------------------------


def test_rows_may_come_late_and_leave_early(engine, rows, answers):
    stepper = engine.stepper()
    first = [stepper.add(row) for row in rows[:5]]
    stepper.step(), stepper.step()
    late = [stepper.add(row) for row in rows[5:20]]
    stepper.step()
    stepper.cancel(first[0])
    while stepper.busy:
        stepper.step()
    for id, answer in zip([*first[1:], *late], answers[1:20], strict=True):
        assert stepper.pop(id).token_ids == answer
    cancelled = stepper.pop(first[0])
    assert cancelled.finish == "cancelled" and cancelled.token_ids == answers[0][:3]
    with pytest.raises(RequestError, match="has not ended"):
        stepper.pop(first[0])


def test_stream_gives_the_same_text_piece_by_piece(engine, rows):
    texts = [""] * 6
    for number, piece, _ in engine.stream(rows[:6]):
        texts[number] += piece
    assert texts == [r.text for r in engine.generate(rows[:6])]


def test_ended_rows_leave_the_batch(engine, blocks):
    rows = [Row(PROMPTS[2], (), Sampling(max_new_tokens=n), seed=n) for n in (2, 2, 2, 20)]
    engine.generate(rows)
    assert blocks[-1][1] == 1


def test_rows_that_do_not_fit_wait(engine, rows, answers, monkeypatch):
    read, tried = Decoding.read, []

    def small(self, some, *rest):
        tried.append(len(some))
        if len(some) + len(self.seats) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(self, some, *rest)

    monkeypatch.setattr(Decoding, "read", small)
    assert [r.token_ids for r in engine.generate(rows[:20])] == answers[:20]
    assert max(tried) > 5
    done = []
    engine.generate(rows[:20], report=lambda n, note="": done.append(n))
    assert max(done) == done[-1] == 20
    monkeypatch.setattr(Decoding, "read", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(RunError, match="single row"):
        engine.generate(rows[:2])


def test_batches_that_do_not_fit_are_halved(engine, rows, answers, monkeypatch):
    step, tried = Decoding.step, []

    def small(self, *given):
        tried.append(len(self.seats))
        if len(self.seats) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *given)

    monkeypatch.setattr(Decoding, "step", small)
    assert [r.token_ids for r in engine.generate(rows[:20])] == answers[:20]
    assert max(tried) > 5


def test_progress_counts_a_row_once_though_memory_ran_out_late(engine, monkeypatch):
    real, steps, done = Stepper.step, [], []

    def late(self):
        steps.append(1)
        if len(steps) == 6:  # the short rows have ended
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self)

    monkeypatch.setattr(Stepper, "step", late)
    rows = [Row(PROMPTS[0], (), Sampling(max_new_tokens=n), seed=n) for n in (2, 2, 2, 30)]
    engine.generate(rows, report=lambda n, note="": done.append(n))
    assert 3 <= max(done[:5]) < 4 and max(done) == done[-1] == 4


def test_errors_of_another_kind_are_not_swallowed(engine, rows, monkeypatch):
    def broken(*_):
        raise RuntimeError("a real bug")

    monkeypatch.setattr(Decoding, "read", broken)
    with pytest.raises(RuntimeError, match="a real bug"):
        engine.generate(rows[:2])


# --- gates, keys, refusals ----------------------------------------------------------------------


def test_a_gate_reads_the_mean_cosine_of_the_prompt(tiny, engine, directions):
    one = tiny.encode(PROMPTS[1])
    with torch.no_grad():
        x = tiny.hf.model(torch.tensor([one.ids]), output_hidden_states=True).hidden_states[3][
            0, 1:
        ]
    mean = float(torch.nn.functional.cosine_similarity(x, directions["two"].unit[None]).mean())
    for threshold, opens in [(mean - 1e-4, True), (mean + 1e-4, False)]:
        text = f"add(one, 4) at 1 if cos(two, resid_post 2) > {threshold}"
        steered, _ = engine.admission.steered(Row(PROMPTS[1], parse(text, directions)))
        assert bool(steered.interventions) is opens
        text = text.replace(">", "<").replace("resid_post 2", "resid_pre 3")
        steered, _ = engine.admission.steered(Row(PROMPTS[1], parse(text, directions)))
        assert bool(steered.interventions) is not opens


def test_keys_tell_contents_apart(tiny, rows, directions):
    keys = {row.key(tiny) for row in rows}
    assert len(keys) == len(rows)
    row = rows[1]
    assert Row(row.prompt, parse(line(row.steer), directions), row.sampling).key(tiny) == row.key(
        tiny
    )
    assert Row(row.prompt, row.steer, row.sampling, seed=1).key(tiny) not in keys
    assert Row(row.prompt, row.steer, Sampling(top_k=3)).key(tiny) not in keys


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("add(one, 4) at 6", "layers 0-5"),
        ("add(head, 4) at 2", "24 wide"),
        ("add(one, 4) at z 1h1", "64 wide"),
        ("add(head, 4) at z 1h4", "heads 0-3"),
        ("add(one, 0.5 dose) at 2", "resolve"),
        ("clamp(one, 1) at 2; clamp(two, 1) at 2 on last", "different scopes"),
        ("clamp(one, 1) at 2; clamp_min(two, 1) at 2", "clamp_min cannot be joined"),
        ("clamp(one, 1) at 2; clamp(one, 2) at 2", "nearly parallel"),
    ],
)
def test_rows_that_do_not_fit_are_refused(engine, directions, text, reason):
    with pytest.raises(RequestError, match=reason):
        engine.generate([Row(PROMPTS[0], parse(text, directions))])


def test_prompt_and_answer_must_fit_the_context(engine):
    with pytest.raises(RequestError, match="exceed the context"):
        engine.generate([Row(PROMPTS[0], (), Sampling(max_new_tokens=600))])


@pytest.mark.parametrize("component", ["resid_pre", "z", "attn_out", "mlp_out", "resid_post"])
def test_a_pass_that_breaks_off_leaves_the_model_as_it_was(tiny, engine, directions, component):
    """Blocks write to some of their tensors in place; weights are never among them."""

    class Stop(Exception):
        pass

    class Failing:
        def __init__(self):
            self.hooks = {(component, 2)}

        def __call__(self, hook, x, places):
            x.zero_()
            raise Stop

    row = Row(PROMPTS[0], parse("add(head, 1) at z 1h1; ablate(one) at mlp_out 3", directions))
    steered = engine.admission.steered(row)
    before = {name: weight.clone() for name, weight in tiny.hf.state_dict().items()}
    ids = torch.tensor([tiny.encode(PROMPTS[0]).ids])
    with torch.no_grad():
        logits = tiny.hf(ids).logits
        with pytest.raises(Stop):
            Decoding(tiny).read([steered], [1], Failing())
        decoding = Decoding(tiny)
        decoding.advance(0, decoding.read([steered], [1]))
        with pytest.raises(Stop):
            decoding.step(torch.tensor([7]), Failing())
        assert all(torch.equal(before[name], w) for name, w in tiny.hf.state_dict().items())
        assert torch.equal(tiny.hf(ids).logits, logits)


def test_nothing_is_left_on_the_model_after_an_exception(tiny_folder, directions, monkeypatch):
    tiny = SteeringModel.load(str(tiny_folder))  # of its own: what others left would be seen late
    row = Row(PROMPTS[0], parse("add(head, 1) at z 1h1; ablate(one) at mlp_out 3", directions))
    before = state(tiny)
    Engine(tiny).generate([row])
    assert state(tiny) == before

    def stop(*_):
        raise RuntimeError("stopped")

    monkeypatch.setattr(type(tiny.hooked.ln_final), "forward", stop)
    with pytest.raises(RuntimeError, match="stopped"):  # its hooks are TransformerLens's own
        hooks.run_with_cache(tiny, row.prompt, row.steer)
    monkeypatch.undo()
    assert state(tiny) == before


def test_bfloat16_batches_differ_no_more_than_transformers_does(tiny_folder, directions):
    model = SteeringModel.load(str(tiny_folder), dtype="bfloat16")
    from interp_steer.engine.verify import verify

    checks = {check.name: check for check in verify(model)}
    assert all(check.passed for check in checks.values())
    assert any("a row in a batch" in name for name in checks)


def test_a_coefficient_beyond_the_number_format_ends_its_row_alone(tiny_folder, directions):
    engine = Engine(SteeringModel.load(str(tiny_folder), dtype="float16"))
    sampling = Sampling(max_new_tokens=10)
    huge = Row(PROMPTS[0], (steer("add", directions["one"], coefficient=1e9, at=2),), sampling)
    overflowed, plain = engine.generate([huge, Row(PROMPTS[0], (), sampling)])
    assert overflowed.finish == "overflow" and overflowed.token_ids == ()
    assert plain.token_ids == engine.generate([Row(PROMPTS[0], (), sampling)])[0].token_ids
    with pytest.raises(RequestError, match="overflow"):
        steer("add", directions["one"], coefficient=1e16, at=2)


def test_a_row_that_cannot_run_does_not_disturb_the_others(engine, directions, answers):
    stepper = engine.stepper()
    good = stepper.add(Row(PROMPTS[0], (), Sampling(max_new_tokens=10)))
    stepper.step()
    clash = parse("clamp(one, 1) at 2; clamp(two, 1) at 2 on last", directions)
    with pytest.raises(RequestError, match="different scopes"):
        stepper.add(Row(PROMPTS[1], clash))
    while stepper.busy:
        stepper.step()
    assert stepper.pop(good).token_ids == answers[0]


def test_a_failed_prefill_leaves_the_running_rows_where_they_were(engine, answers, monkeypatch):
    stepper = engine.stepper()
    good = stepper.add(Row(PROMPTS[0], (), Sampling(max_new_tokens=10)))
    stepper.step()
    late = stepper.add(Row(PROMPTS[1], (), Sampling(max_new_tokens=10)))
    with monkeypatch.context() as patch:
        patch.setattr(Decoding, "read", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stepper.step()
    while stepper.busy:
        stepper.step()
    assert stepper.pop(good).token_ids == answers[0]
    assert stepper.pop(late).token_ids == answers[len(LINES)]


@pytest.mark.parametrize("ids", [[-1], [10**9], [1.5], [True], [None]])
def test_what_is_no_token_id_is_refused(engine, ids):
    check = getattr(Engine.ids, "__wrapped__", Engine.ids)  # past the tests' own type checks
    with pytest.raises(RequestError, match="no token id"):
        check(engine, PROMPTS[0], ids)


def test_a_batch_below_one_and_broken_text_are_refused(engine):
    with pytest.raises(RequestError, match="batch is -1"):
        engine.generate([Row(PROMPTS[0])], batch=-1)
    for broken in (
        lambda: engine.generate([Row("a \udcff")]),
        lambda: engine.score([Row("a b")], ["\udcff"]),
    ):
        with pytest.raises(RequestError, match="no Unicode character"):
            broken()


def test_a_record_tells_what_was_asked(tiny):
    prompts = ["I love", chat("Hi"), chat("Name a tower.", "Be brief.", answer="The")]
    results = Engine(tiny).generate([Row(p, (), Sampling(max_new_tokens=1)) for p in prompts])
    assert [record(one)["prompt"] for one in results] == ["I love", "Hi", "Name a tower."]


def test_a_prompt_of_tokens_is_taken_as_it_is(tiny, engine, directions):
    """No BOS, no template: greedy tokens are those of transformers for these very ids."""
    text = "The quick brown fox"
    ids = tiny.encode(text).ids[1:]
    row = Row(tiny.encoded(ids), (), Sampling(max_new_tokens=12))
    (result,) = engine.generate([row])
    with torch.no_grad():
        expected = tiny.hf.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    assert list(result.token_ids) == expected[0, len(ids) :].tolist()[: len(result.token_ids)]
    with_bos = Row(tiny.encoded(tiny.encode(text).ids), (), row.sampling)
    assert engine.generate([with_bos, Row(text, (), row.sampling)])[0].token_ids == (
        engine.generate([Row(text, (), row.sampling)])[0].token_ids
    )
    for wrong, said in (((), "is empty"), ((0, 5000), "5000 is no token"), ((1,) * 600, "600 tok")):
        with pytest.raises(RequestError, match=said):
            tiny.encoded(wrong)
