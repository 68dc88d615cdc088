import itertools

import pytest
import torch

from interp_steer.causal import select as selection
from interp_steer.causal.select import select_direction
from interp_steer.errors import RequestError
from interp_steer.model.site import Site
from interp_steer.prompts.item import Item
from interp_steer.prompts.prompt import chat
from tests.causal.test_ablate import ids_of, run
from tests.causal.test_trace import difference, moved
from tests.conftest import hf_streams


def chats(*texts: str) -> list[Item]:
    return [Item(chat(text)) for text in texts]


BUILD = (
    chats("I love the fox", "Yes, the fox", "A fox jumps"),
    chats("I hate rain", "No", "A lazy dog"),
)


CHOOSE = (chats("fox who", "the fox is it"), chats("dog who", "the dog is lazy"))


PROVE = (chats("one fox", "two fox"), chats("one rain", "two rain", "three rain"))


def score_of(model, logprobs) -> float:
    wanted = {ids_of(model, text)[0] for text in ("fox", " fox")}
    return logprobs[-1].exp()[list(wanted)].sum().log().item()


def effects(model, sides, vector, layer: int, first: int = 1) -> tuple[float, float, float]:
    """Mean changes by adding, by ablating, and the mean KL of ablating, by TransformerLens."""
    unit = vector / vector.norm()

    def kept(x, new):
        return torch.cat([x[:, :first], new[:, first:]], 1)

    add = [(f"blocks.{layer}.hook_resid_post", lambda x, hook: kept(x, x + vector))]
    places = itertools.product(range(6), ("hook_resid_pre", "hook_attn_out", "hook_mlp_out"))
    ablate = [
        (f"blocks.{n}.{kind}", lambda x, hook: kept(x, x - (x @ unit)[..., None] * unit))
        for n, kind in places
    ]
    added, ablated, kl = [], [], []
    for side, found in zip(sides, (ablated, added), strict=True):
        for item in side:
            ids = model.encode(item.prompt).ids
            plain = run(model, ids)[1]
            gone = run(model, ids, ablate)[1]
            if found is added:
                added.append(score_of(model, run(model, ids, add)[1]) - score_of(model, plain))
                kl.append((plain.exp() * (plain - gone)).sum(-1)[-1].item())
            else:
                ablated.append(score_of(model, gone) - score_of(model, plain))
    return tuple(sum(values) / len(values) for values in (added, ablated, kl))


@pytest.mark.parametrize("by", selection.RANKED)
def test_selection_scores_each_candidate_and_takes_the_best(tiny, by):
    first = by == "both"
    found = select_direction(
        tiny, BUILD, CHOOSE, PROVE, words=["fox"], by=by, max_kl=0.45, first=first, name="fox"
    )
    table, n = found.table, 6  # tokens after the user's text
    assert len(table) == 6 * n
    taken = {"add": 0, "ablate": -table["ablated"], "both": -table["ablated"]}[by]
    left = table["layer"] < 5
    wanted = (table["added"] if by != "ablate" else 0) + taken
    assert (table["rank_by"] - wanted)[left].abs().max() < 1e-6
    for _, row in table.iloc[:: 35 if by == "ablate" else 7].iterrows():
        layer, position = int(row["layer"]), int(row["position"])
        means = [
            torch.stack(
                [hf_streams(tiny, tiny.encode(i.prompt).ids)[layer + 1][0, position] for i in side]
            ).mean(0)
            for side in BUILD
        ]
        vector = (means[0] - means[1]).detach()
        assert row["norm"] == pytest.approx(vector.norm().item(), rel=1e-4)
        if layer == 5:  # not below 0.8 x 6
            assert row["veto"] == "layer is not below 0.8 x 6" and row["kl"] != row["kl"]
            continue
        added, ablated, kl = effects(tiny, CHOOSE, vector, layer, 0 if first else 1)
        assert (row["added"], row["ablated"], row["kl"]) == (
            pytest.approx(added, abs=1e-3), pytest.approx(ablated, abs=1e-3),
            pytest.approx(kl, abs=1e-3),
        )  # fmt: skip
        expected = "KL is not below 0.45" if kl >= 0.45 else ""
        if not expected and added <= 0:
            expected = "adding it does not raise the score"
        assert row["veto"] == expected
    fine = table[table["veto"] == ""]
    best = table[table["chosen"]].iloc[0]
    assert 1 < len(fine) < 30 and best["rank_by"] == fine["rank_by"].max() and best["veto"] == ""
    assert (found.layer, found.position) == (best["layer"], best["position"])
    assert found.direction.site == Site("resid_post", found.layer)
    assert found.direction.norm == pytest.approx(best["norm"]) and found.direction.name == "fox"
    vector = found.direction.vector
    proved = effects(tiny, PROVE, vector, found.layer, 0 if first else 1)
    for measure, value, count in zip(("added", "ablated", "kl"), proved, (3, 2, 3), strict=True):
        some = found.proof[found.proof["measure"] == measure]
        assert len(some) == count and some["change"].mean() == pytest.approx(value, abs=1e-3)


def test_selection_by_logit_differences_of_plain_texts(tiny):
    """Without a template the last position is the only candidate; items bring their answers."""

    def items(*texts):
        return [Item(text, " fox", " dog") for text in texts]

    parts = [
        (items("I love the", "Yes, the"), items("I hate the", "No, the")),
        (items("What is the"), items("Name the")),
        (items("the tower and the"), items("rain and the")),
    ]
    found = select_direction(tiny, *parts, max_kl=9, layers=[0, 2, 4])
    assert list(found.table["layer"]) == [0, 2, 4] and set(found.table["position"]) == {-1}
    ends = [[hf_streams(tiny, tiny.encode(item.prompt).ids) for item in side] for side in parts[0]]
    for _, row in found.table.iterrows():
        layer = int(row["layer"])
        means = [torch.stack([x[layer + 1][0, -1] for x in side]).mean(0) for side in ends]
        shift = (means[0] - means[1]).detach()
        assert row["norm"] == pytest.approx(shift.norm().item(), rel=1e-4)
        (item,) = parts[1][1]
        hook = (f"blocks.{layer}.hook_resid_post", lambda x, hook, s=shift: moved(x, s))
        ids = tiny.encode(item.prompt).ids
        changes = [difference(tiny, item, run(tiny, ids, some)[1]) for some in ([hook], [])]
        assert row["added"] == pytest.approx(changes[0] - changes[1], abs=1e-3)
    assert found.table["added"].abs().min() > 0.01


def test_selection_errors(tiny):
    options = {"build": BUILD, "choose": CHOOSE, "prove": PROVE, "words": ["fox"], "max_kl": 0.45}
    for changes, said in (
        ({"prove": CHOOSE}, "'fox who' is asked both in choose and in prove"),
        (
            {"prove": ([chat(CHOOSE[0][0].text, "Be kind.", "Yes")], PROVE[1])},
            "is asked both in choose and in prove",
        ),
        ({"choose": (BUILD[1], CHOOSE[1])}, "'I hate rain' is asked both in build and in choose"),
        ({"prove": (PROVE[0], [])}, "prove needs prompts on both sides"),
        ({"words": []}, "has no answers, positive and negative, to be scored by"),
        ({"by": "adding"}, "unknown rank 'adding'; nearest: add"),
        ({"max_kl": 0.0}, r"all 36 candidates are vetoed: 30 x KL .* 6 x layer .*least KL 0\.\d"),
        ({"layers": [5]}, "all 6 candidates are vetoed: 6 x layer is not below"),
        ({"positions": [-40]}, "position -40 is out of range: candidates stand at -1 to"),
        ({"positions": [0]}, "position 0 is out of range"),
    ):
        with pytest.raises(RequestError, match=said):
            select_direction(tiny, **{**options, **changes})
