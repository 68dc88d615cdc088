"""Patching, propagation, mediation and selection, each against TransformerLens or Hugging Face."""

import pytest
import torch

from interp_steer.causal import trace as tracing
from interp_steer.causal.branch import Trunk
from interp_steer.causal.trace import mediation, patch, propagation
from interp_steer.engine.hooks import fwd_hooks
from interp_steer.errors import RequestError
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.prompts.item import Item
from interp_steer.prompts.prompt import chat
from interp_steer.steering.direction import Direction
from interp_steer.steering.grammar import steer
from interp_steer.steering.intervention import Gate
from interp_steer.steering.lens import JacobianLens
from tests.causal.test_ablate import FOX, HOOKS, activations, ids_of, replacing, run, sequence
from tests.conftest import hf_streams, state

TOWER = Item(
    "I love the tower; I hate", " the dog", " the fox", corrupted="I hate the tower; I love"
)
ITEMS = [FOX, TOWER]
AT = 2


def tokens(model, item: Item, prompt=None) -> list[int]:
    tail = " the" if item.id == TOWER.id else ""
    return [*model.encode(prompt or item.prompt).ids, *ids_of(model, tail)]


def difference(model, item: Item, logprobs) -> float:
    yes, no = (ids_of(model, text)[-1] for text in (item.positive, item.negative))
    return (logprobs[-1, yes] - logprobs[-1, no]).item()


def direction(seed: int = 0, layer: int = AT, width: int = 64) -> Direction:
    draw = torch.Generator().manual_seed(seed)
    return Direction.of(
        torch.randn(width, generator=draw), f"blocks.{layer}.hook_resid_post", f"d{seed}"
    )


# --- patching -----------------------------------------------------------------------------------


# --- propagation --------------------------------------------------------------------------------


def steered_streams(model, ids, length: float, where: list[int]) -> list[torch.Tensor]:
    """Streams under an addition at block AT by a plain Hugging Face hook."""
    shift = torch.zeros(1, len(ids), 64)
    shift[:, where] = length * direction().unit
    handle = model.hf.model.layers[AT].register_forward_hook(lambda _m, _a, out: out + shift)
    try:
        streams = hf_streams(model, ids)
    finally:
        handle.remove()
    # transformers records the output of a block before this hook changes it
    return [x + shift if n == AT + 1 else x for n, x in enumerate(streams)]


@pytest.mark.parametrize("scope", ["all", "content"])
def test_propagation_is_what_hugging_face_sees(tiny, scope):
    prompts = [chat("Name three fruits"), "I love the tower; I hate the rain", "Yes, no"]
    found = propagation(
        tiny, prompts, (steer("add", direction(), coefficient=9, at=AT, on=scope),), top=4, batch=2
    )
    assert len(found.table) == 3 * 4 and len(found.risen) == 4 * 4
    encoded = [tiny.encode(p) for p in prompts]
    plain, moved, where = [], [], []
    for one in encoded:
        n = len(one.ids)
        where.append([p for p in range(1, n) if scope == "all" or one.content[p]])
        plain.append(hf_streams(tiny, one.ids))
        moved.append(steered_streams(tiny, one.ids, 9.0, where[-1]))

    def lens(x):
        normed = x / (x.square().mean() + 1e-5).sqrt() * tiny.hf.model.norm.weight
        return (normed @ tiny.hf.lm_head.weight.T).softmax(-1).detach()

    for layer in range(AT, 6):
        pairs = [(a[layer + 1][0], b[layer + 1][0]) for a, b in zip(plain, moved, strict=True)]
        median = torch.cat([a[1:].norm(dim=-1) for a, _ in pairs]).median().item()
        rows = found.table[found.table["layer"] == layer].set_index("item")
        before, after = torch.zeros(tiny.d_vocab), torch.zeros(tiny.d_vocab)
        for prompt, (a, b), spots in zip(prompts, pairs, where, strict=True):
            row = rows.loc[Item.of(prompt).id]
            apart = (b - a).norm(dim=-1)
            numbers = {"last": apart[-1], "steered": apart[spots].mean(), "all": apart[1:].mean()}
            for name, value in numbers.items():
                assert row[name] == pytest.approx(value.item(), rel=1e-3, abs=1e-4)
                assert row[name + "_relative"] == pytest.approx(row[name] / median, rel=1e-4)
            p, q = lens(a[-1]), lens(b[-1])
            assert row["kl"] == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-4)
            before, after = before + p / 3, after + q / 3
        risen = found.risen[found.risen["layer"] == layer]
        best = (after - before).topk(4)
        assert list(risen["rise"]) == pytest.approx(best.values.tolist(), abs=1e-5)
        assert list(risen["token"]) == [tiny.decode_token(i) for i in best.indices.tolist()]
        assert list(risen["after"]) == pytest.approx(after[best.indices].tolist(), abs=1e-5)
    assert found.table["kl"].max() > 0.01


def test_a_jacobian_lens_reads_beside_the_logit_lens(tiny):
    """J x under the model's own norm and head; layers that the lens lacks are read by one alone."""
    draw = torch.Generator().manual_seed(4)
    matrices = {n: torch.randn(64, 64, generator=draw) / 8 for n in (2, 3)}
    given = JacobianLens((2, 3), 64, 1, {}, matrices)
    steering = (steer("add", direction(), coefficient=9, at=AT),)
    found = propagation(tiny, ["I love the tower"], steering, top=3, lens=given).risen
    assert set(found["read"]) == {"logit lens", "jacobian lens"}
    own = found[found["read"] == "jacobian lens"]
    assert set(own["layer"]) == {n for n in (2, 3) if n >= AT}
    ids = tiny.encode("I love the tower").ids
    plain = hf_streams(tiny, ids)
    moved = steered_streams(tiny, ids, 9.0, range(1, len(ids)))
    for layer, some in own.groupby("layer"):
        chances = []
        for streams in (plain, moved):
            x = matrices[layer] @ streams[layer + 1][0, -1]
            normed = x / (x.square().mean() + 1e-5).sqrt() * tiny.hf.model.norm.weight
            chances.append((normed @ tiny.hf.lm_head.weight.T).softmax(-1).detach())
        rise = (chances[1] - chances[0]).topk(3).values
        assert list(some["rise"]) == pytest.approx(rise.tolist(), abs=1e-5)


def test_a_shut_gate_moves_nothing(tiny):
    gate = Gate(direction(1), Site("resid_post", 1), True, 0.99)
    found = propagation(
        tiny, ["Yes, no"], (steer("add", direction(), coefficient=9, at=AT, gate=gate),)
    )
    assert (found.table["all"] == 0).all() and found.table["steered"].isna().all()


def test_propagation_errors(tiny):
    one = (steer("add", direction(), coefficient=9, at=AT),)
    for prompts, steering, said in (
        ([], one, "needs prompts"),
        (["Yes"], (), "an intervention"),
        (["Yes"], (steer("add", direction(), coefficient="1 dose", at=AT),), "no length yet"),
    ):
        with pytest.raises(RequestError, match=said):
            propagation(tiny, prompts, steering)
    with pytest.raises(RequestError, match="unknown column 'las'; nearest: last"):
        propagation(tiny, ["Yes, no"], one).summary("las")


# --- mediation ----------------------------------------------------------------------------------


def settings() -> dict[str, tuple]:
    head = direction(2, width=24)
    return {
        "add": (steer("add", direction(), coefficient=9, at=AT),),
        "late": (steer("add", direction(), coefficient=9, at=AT, on="last"),),
        "rotate": (steer("rotate", direction(), direction(1), coefficient="70 deg", at="1-3"),),
        "parts": (
            steer("clamp", direction(), coefficient=6, at="attn_out 3 + mlp_out 2 + resid_pre 2"),
        ),
        "head": (steer("add", head, coefficient=4, at="z 2h1"),),
    }


@pytest.mark.parametrize(
    ("kind", "score", "begins"),
    [
        ("add", "logit_difference", 3),
        ("add", "kl_last", 3),
        ("late", "words", 3),
        ("rotate", "kl_last", 2),
        ("parts", "logit_difference", 2),
        ("head", "words", 2),
    ],
)
def test_mediation_restores_one_part_at_a_time(tiny, kind, score, begins):
    """The steering's own hooks in TransformerLens, then the clean value of one later part."""
    steering, words = settings()[kind], ("dog", "tower")
    wanted = {ids_of(tiny, text)[0] for word in words for text in (word, " " + word)}
    found = mediation(
        tiny, ITEMS, steering, score, words=words, answer=1, components=tracing.RESTORED
    )
    table = found.table
    sums: dict[tuple, list[float]] = {}
    assert set(table["score"]) == {score}
    assert len(table) == 2 * (6 - begins) * (2 + tiny.n_heads)
    assert table["layer"].min() == begins
    for item in ITEMS:
        ids, last = tokens(tiny, item), len(tiny.encode(item.prompt).ids) - 1
        cache, plain = activations(tiny, ids), run(tiny, ids)[1]

        def value(logprobs, item=item, last=last, plain=plain):
            if score == "logit_difference":
                return difference(tiny, item, logprobs)
            if score == "words":
                return logprobs[last].exp()[list(wanted)].sum().log().item()
            return (plain.exp() * (plain - logprobs)).sum(-1)[last].item()

        hooks = fwd_hooks(tiny, steering, item.prompt)
        before, full = value(plain), value(run(tiny, ids, hooks)[1])
        assert abs(full - before) > 0.01
        for _, row in table[table["item"] == item.id].iterrows():
            name = f"blocks.{row['layer']}.{HOOKS[row['component']][0]}"
            clean, head = cache[name][0], None
            if row["component"] == "z":
                head = int(row["head"])
                clean = clean[:, head]
            restored = value(run(tiny, ids, [*hooks, (name, replacing(clean, head, first=0))])[1])
            assert row["unsteered"] == pytest.approx(before, abs=1e-4)
            assert row["steered"] == pytest.approx(full, abs=1e-4)
            assert row["restored"] == pytest.approx(restored, abs=1e-4)
            both = sums.setdefault((row["component"], row["layer"], head), [0.0, 0.0])
            both[0] += full - restored
            both[1] += full - before
    summary = found.summary()
    assert list(summary["estimate"]) == sorted(summary["estimate"], reverse=True)
    for _, row in summary.iterrows():
        head = int(row["head"]) if row["component"] == "z" else None
        gone, whole = sums[row["component"], row["layer"], head]
        assert row["estimate"] == pytest.approx(gone / whole, abs=2e-3, rel=2e-3)
        assert row["effect"] == pytest.approx(whole / 2, abs=1e-4) and row["score"] == score


def test_words_are_read_over_the_answer(tiny):
    """Teacher-forced on the unsteered model's own greedy answer, or on the continuation given."""
    steering, n = settings()["add"], 6
    given = Item("Name the lazy dog", continuation=" happy and sad")
    items = [FOX, given]
    wanted = sorted({ids_of(tiny, text)[0] for text in ("dog", " dog")})
    table = mediation(tiny, items, steering, "words", words=["dog"], answer=n).table
    for item in items:
        prompt = list(tiny.encode(item.prompt).ids)
        with torch.no_grad():
            greedy = tiny.hf.generate(
                torch.tensor([prompt]), max_new_tokens=n - 1, do_sample=False, pad_token_id=1,
                eos_token_id=[1, 3], attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            )[0].tolist()  # fmt: skip
        if item is given:
            greedy = prompt + ids_of(tiny, given.continuation)
        assert len(greedy) > len(prompt) + 2 and not {1, 3} & set(greedy)

        def value(logprobs, start=len(prompt) - 1):  # noqa: B008
            return logprobs[start:, wanted].exp().sum(-1).mean().log().item()

        cache, plain = activations(tiny, greedy), run(tiny, greedy)[1]
        # scope `all`: the answer's positions are steered as they would be while it is written
        shift = 9 * direction().unit
        shift = (f"blocks.{AT}.hook_resid_post", lambda x, hook, s=shift: moved(x, s))
        for _, row in table[table["item"] == item.id].iterrows():
            assert row["unsteered"] == pytest.approx(value(plain), abs=1e-4)
            full = value(run(tiny, greedy, [shift])[1])
            assert row["steered"] == pytest.approx(full, abs=1e-4)
            name = f"blocks.{row['layer']}.{HOOKS[row['component']][0]}"
            back = (name, replacing(cache[name][0], first=0))
            restored = value(run(tiny, greedy, [shift, back])[1])
            assert row["restored"] == pytest.approx(restored, abs=1e-4)
    short = mediation(tiny, items, steering, "words", words=["dog"], answer=1).table
    apart = (short["steered"] - table["steered"]).abs()
    assert apart[table["item"] == FOX.id].min() > 1e-3  # the first position alone is another score
    with pytest.raises(RequestError, match="an answer of 0 tokens"):
        mediation(tiny, items, steering, "words", words=["dog"], answer=0)


def moved(x, shift):
    return torch.cat([x[:, :1], x[:, 1:] + shift], 1)


def test_small_batches_trace_the_same(tiny):
    steering = settings()["add"]
    whole = mediation(tiny, ITEMS, steering).table
    small = mediation(tiny, ITEMS, steering, batch=1).table
    assert (whole["restored"] - small["restored"]).abs().max() < 1e-4
    assert (whole["steered"] - whole["restored"]).abs().max() > 0.01


def test_no_effect_has_no_share(tiny):
    gate = Gate(direction(1), Site("resid_post", 1), True, 0.99)
    none = steer("add", direction(), coefficient=9, at=AT, gate=gate)
    found = mediation(tiny, ITEMS, (none,))
    assert found.summary()["estimate"].isna().all() and "no more than rounding" in found.warning


def test_mediation_errors(tiny):
    late = steer("add", direction(), coefficient=1, at=5)
    one = settings()["add"]
    for options, said in (
        ({"steer": ()}, "needs an intervention"),
        ({"steer": (late,)}, "after the last block"),
        ({"components": ["resid_pre"]}, "unknown component 'resid_pre'"),
        ({"score": "logit"}, "unknown score 'logit'; nearest: logit_difference"),
        ({"score": "words"}, "no words are given"),
        ({"prompts": ["Yes, no"], "score": "logit_difference"}, "no item has answers"),
        ({"prompts": []}, "no items given"),
    ):
        with pytest.raises(RequestError, match=said):
            mediation(tiny, **{"prompts": ITEMS, "steer": one, **options})


# --- choosing a direction -----------------------------------------------------------------------


def test_nothing_is_left_after_an_exception(tiny_folder, monkeypatch):
    tiny = SteeringModel.load(str(tiny_folder))  # of its own: what others left would be seen late
    steering, calls = settings()["parts"], []
    for study in (
        lambda: patch(tiny, ITEMS, ["z", "attn_out"], positions="all"),
        lambda: mediation(tiny, ITEMS, steering),
        lambda: propagation(tiny, ITEMS, steering),
    ):
        before = state(tiny)
        study()
        assert state(tiny) == before

        def failing(x):
            calls.append(1)
            raise KeyboardInterrupt

        monkeypatch.setattr(tiny, "unembed", failing)
        with pytest.raises(KeyboardInterrupt):
            study()
        monkeypatch.undo()
        assert state(tiny) == before
    assert len(calls) == 3


def test_progress_is_told(tiny):
    def collect(study):
        said: list[float] = []
        study(lambda done, note="": said.append(done))
        assert said == sorted(said)
        return said[-1]

    steering = settings()["add"]
    patched = collect(lambda r: patch(tiny, ITEMS, ["z"], positions="all", batch=2, report=r))
    assert patched == pytest.approx(1)
    assert collect(lambda r: mediation(tiny, ITEMS, steering, batch=2, report=r)) == 1
    assert collect(lambda r: propagation(tiny, ITEMS, steering, batch=1, report=r)) == 2


def test_the_trunk_is_transformer_lens_own(tiny):
    trunk = Trunk(tiny, [sequence(tiny, i) for i in ITEMS], {("z", 3), ("mlp_out", 0)})
    for row, item in enumerate(ITEMS):
        cache = activations(tiny, sequence(tiny, item))
        n = len(sequence(tiny, item))
        for component, layer in (("z", 3), ("mlp_out", 0), ("resid_pre", 4), ("resid_post", 5)):
            mine = trunk.value(component, layer)[row, :n]
            theirs = cache[f"blocks.{layer}.{HOOKS[component][0]}"][0]
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
