import torch

from interp_steer.causal.ablate import ablate
from interp_steer.causal.branch import Edit, Trunk, put
from interp_steer.model.model import SteeringModel
from tests.causal.test_ablate import FOX, HOOKS, ITEMS, replacing, run, sequence


def test_every_branch_is_a_full_pass_of_transformer_lens(tiny):
    """Streams after the last block, to 1e-5 max(1, |x|), for every component, layer and head."""
    draw = torch.Generator().manual_seed(0)
    ids = [sequence(tiny, item) for item in ITEMS]
    trunk = Trunk(tiny, ids)
    places = [
        (component, layer, head)
        for component in ("resid_pre", "resid_post", "attn_out", "mlp_out", "z")
        for layer in range(tiny.n_layers)
        for head in (range(tiny.n_heads) if component == "z" else (None,))
    ]
    values = [
        torch.randn(tiny.d_model if head is None else tiny.d_head, generator=draw)
        for _, _, head in places
    ]
    edits = [
        Edit(component, layer, lambda x, v=v: put(trunk.changed(), v, x), head)
        for (component, layer, head), v in zip(places, values, strict=True)
    ]
    singles = [(edit,) for edit in edits]
    pairs = [(edits[n], edits[-n - 1]) for n in range(0, 20, 3)]  # two places, shared edits
    variants = [*singles, (), *pairs]
    out = trunk.branch(variants)
    full = trunk.branch(variants, resume=False)
    assert len(out) == len(variants) == 48 + 1 + 7
    for number, variant in enumerate(variants):
        hooks = []
        for edit in variant:
            at = edits.index(edit)
            component, layer, head = places[at]
            name = f"blocks.{layer}.{HOOKS[component][0]}"
            hooks.append((name, replacing(values[at], head)))
        for row, one in enumerate(ids):
            stream, _ = run(tiny, one, hooks)
            bound = 1e-5 * stream.norm(dim=-1).clamp_min(1)
            for mine in (out, full):
                apart = (mine[number, row, : len(one)] - stream).norm(dim=-1)
                assert (apart <= bound).all(), (variant, row, apart / bound)


def test_a_variant_resumes_from_its_first_edit(tiny, monkeypatch):
    """Block by block: only what has begun is computed, and equal histories once."""
    trunk, rows = Trunk(tiny, [sequence(tiny, FOX)]), []
    zero = [Edit("attn_out", layer, torch.zeros_like) for layer in range(6)]
    block = tiny.block
    monkeypatch.setattr(
        tiny,
        "block",
        lambda layer, x, *rest, **more: (
            rows.append((layer, len(x))) or block(layer, x, *rest, **more)
        ),
    )
    trunk.branch([(edit,) for edit in zero])
    assert rows == [(layer, layer + 1) for layer in range(6)]
    rows.clear()
    trunk.branch([tuple(zero[: n + 1]) for n in range(6)])  # upward: all share their beginning
    assert rows == [(layer, layer + 1) for layer in range(6)]
    rows.clear()
    trunk.branch([(zero[4],), ()])
    assert rows == [(4, 1), (5, 1)]
    rows.clear()
    trunk.branch([(zero[4],), (zero[5],)], resume=False)
    assert rows == [(layer, 2) for layer in range(6)]


def test_bfloat16_streams_stay_bfloat16(tiny_folder):
    model = SteeringModel.load(str(tiny_folder), dtype="bfloat16")
    trunk = Trunk(model, [sequence(model, FOX)], {("z", 1)})
    edit = Edit("z", 1, lambda x: put(trunk.changed(), torch.zeros(()), x), 2)
    assert trunk.branch([(edit,)]).dtype == trunk.value("z", 1).dtype == torch.bfloat16
    found = ablate(model, ITEMS, ["mlp_out", "z"], ["mean"]).table
    exact = ablate(SteeringModel.load(str(tiny_folder)), ITEMS, ["mlp_out", "z"], ["mean"]).table
    assert (found["value"] - exact["value"]).abs().median() < 0.05
