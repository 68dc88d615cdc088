import pytest

from interp_steer.causal.trace import patch
from interp_steer.errors import RequestError
from interp_steer.prompts.item import Item
from tests.causal.test_ablate import FOX, HOOKS, activations, run
from tests.causal.test_trace import ITEMS, difference, tokens


@pytest.mark.parametrize("positions", ["all", "each", (-1, 2)])
def test_patching_is_transformer_lens_own(tiny, positions):
    parts = ["resid_pre", "resid_post", "block", "attn_out", "mlp_out", "z"]
    parts = parts[2:] if positions == "all" else parts
    layers, heads = ([2, 5], [1]) if positions == "each" else ([0, 3, 5], None)
    table = patch(tiny, ITEMS, parts, positions=positions, layers=layers, heads=heads).table
    rows = {"all": 2, "each": 6 + 9, (-1, 2): 4}[positions]  # of both items
    assert len(table) == rows * len(layers) * (len(parts) - 1 + (1 if heads else tiny.n_heads))
    assert set(table["score"]) == {"logit_difference"}
    pairs = {i.id: (tokens(tiny, i), tokens(tiny, i, i.corrupted)) for i in ITEMS}
    caches = {i: activations(tiny, clean) for i, (clean, _) in pairs.items()}
    for item in ITEMS:
        clean, corrupt = (difference(tiny, item, run(tiny, ids)[1]) for ids in pairs[item.id])
        assert abs(clean - corrupt) > 0.1
        for _, row in table[table["item"] == item.id].iterrows():
            head = int(row["head"]) if row["component"] == "z" else None
            spot = slice(None) if positions == "all" else int(row["position"])
            if spot == -1:
                spot = len(tiny.encode(item.prompt).ids) - 1

            def hook(x, hook, head=head, spot=spot, cache=caches[item.id]):
                x, value = x.clone(), cache[hook.name]
                if head is None:
                    x[:, spot] = value[:, spot]
                else:
                    x[:, spot, head] = value[:, spot, head]
                return x

            names = [f"blocks.{row['layer']}.{kind}" for kind in HOOKS[row["component"]]]
            changed = run(tiny, pairs[item.id][1], [(name, hook) for name in names])[1]
            value = difference(tiny, item, changed)
            assert row["value"] == pytest.approx(value, abs=1e-4)
            assert (row["clean"], row["corrupt"]) == pytest.approx((clean, corrupt), abs=1e-4)
            if positions != "all":
                assert row["token"] == tiny.decode_token(pairs[item.id][0][spot])


def test_the_whole_stream_at_all_positions_is_refused(tiny):
    """It is the clean pass: 1.0 at every layer, which says nothing of the model."""
    for part in ("resid_pre", "resid_post"):
        with pytest.raises(RequestError, match=f"{part} at all positions is the whole clean pass"):
            patch(tiny, ITEMS, ["mlp_out", part], positions="all")
    each = patch(tiny, ITEMS).table  # each position, unless asked otherwise
    assert set(each["component"]) == {"resid_pre"} and set(each["position"]) == set(range(9))
    last = patch(tiny, ITEMS, positions="last").table
    assert last.equals(patch(tiny, ITEMS, positions=[-1]).table) and set(last["position"]) == {-1}
    # before block 0 every position but the changed ones is the same in both prompts
    first = each[(each["layer"] == 0) & (each["item"] == FOX.id)].set_index("position")
    clean, corrupt = tiny.encode(FOX.prompt).ids, tiny.encode(FOX.corrupted).ids
    for n, (a, b) in enumerate(zip(clean, corrupt, strict=True)):
        moved = abs(first["value"][n] - first["corrupt"][n])
        assert moved < 1e-4 if a == b else moved > 1e-3


def test_where_two_prompts_do_not_differ_in_effect_there_is_no_share(tiny):
    same = Item(FOX.prompt, " dog", " fox", corrupted=FOX.prompt)
    found = patch(tiny, [same], ["mlp_out"])
    assert found.summary()["estimate"].isna().all() and "no more than rounding" in found.warning


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"components": ["direction"]}, "unknown component 'direction'"),
        ({"items": [Item(FOX.prompt, " dog", " fox")]}, "it lacks a corrupted prompt"),
        ({"items": [FOX, Item("Yes", corrupted="No")]}, "it lacks answers"),
        ({"items": [Item("Yes", " a", " the", corrupted="Yes, no")]}, "corrupted prompt 5"),
        ({"positions": [-7]}, "position -7 is out of range: .* has positions 0-5"),
        ({"positions": [6]}, "position 6 is out of range: .* has positions 0-5"),
        ({"positions": "every"}, "unknown positions 'every'"),
        ({"positions": []}, "no positions given"),
        ({"layers": [9]}, "layer 9 is out of range"),
    ],
)
def test_patching_errors(tiny, changes, said):
    with pytest.raises(RequestError, match=said):
        patch(tiny, **{"items": ITEMS, **changes})
