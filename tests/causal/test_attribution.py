import pytest

from interp_steer.causal.attribution import attribute
from interp_steer.errors import RequestError
from tests.causal.test_ablate import HOOKS, activations, run
from tests.causal.test_trace import ITEMS, difference, tokens

STEP = 1e-2


def slope(tiny, item, row, positions):
    """The change of the logit difference over a small step of TransformerLens's own patching, from
    the corrupted towards the clean value.
    """
    ids = tokens(tiny, item, item.corrupted)
    clean, corrupt = activations(tiny, tokens(tiny, item)), activations(tiny, ids)
    (kind,) = HOOKS[row["component"]]
    name = f"blocks.{row['layer']}.{kind}"
    at = (slice(None), slice(None) if positions == "all" else int(row["position"]))
    at += (int(row["head"]),) if row["component"] == "z" else ()

    def moved(sign):
        def hook(x, hook):
            x = x.clone()
            x[at] += sign * STEP * (clean[name] - corrupt[name])[at]
            return x

        return difference(tiny, item, run(tiny, ids, [(name, hook)])[1])

    return (moved(1) - moved(-1)) / (2 * STEP)


@pytest.mark.parametrize("positions", ["all", "each"])
def test_it_is_the_slope_of_patching(tiny, positions):
    parts = ["attn_out", "mlp_out", "z"] + ["resid_pre", "resid_post"] * (positions == "each")
    table = attribute(tiny, ITEMS, parts, positions=positions, layers=[0, 3]).table
    for item in ITEMS:
        before = difference(tiny, item, run(tiny, tokens(tiny, item, item.corrupted))[1])
        rows = table[table["item"] == item.id]
        for _, row in rows.sample(min(len(rows), 24), random_state=1).iterrows():
            assert row["corrupt"] == pytest.approx(before, abs=1e-4)
            estimate = row["value"] - row["corrupt"]
            assert estimate == pytest.approx(slope(tiny, item, row, positions), rel=1e-2, abs=3e-3)
    assert (table["value"] - table["corrupt"]).abs().max() > 0.05


def test_it_leaves_the_model_as_it_was(tiny):
    from tests.conftest import state

    before = state(tiny)
    attribute(tiny, ITEMS, ["z"])
    assert state(tiny) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"components": ["block"]}, "unknown component 'block'"),
        ({"components": ["resid_pre"]}, "at all positions is the whole clean pass"),
        ({"layers": [9]}, "layer 9 is out of range"),
    ],
)
def test_errors(tiny, changes, said):
    with pytest.raises(RequestError, match=said):
        attribute(tiny, **{"items": ITEMS, **changes})
