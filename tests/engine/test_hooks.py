"""Hooks for TransformerLens on batches, against plain hooks that share no code with them."""

import pytest
import torch

from interp_steer.engine import hooks
from interp_steer.engine.bank import Operands, Steering
from interp_steer.errors import RequestError
from interp_steer.model.model import SteeringModel
from interp_steer.steering.direction import Direction
from interp_steer.steering.grammar import parse

PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def way(tiny: SteeringModel) -> Direction:
    draw = torch.Generator().manual_seed(3)
    return Direction.of(torch.randn(64, generator=draw), "blocks.2.hook_resid_post", "way")


def test_every_row_of_a_batch_is_steered(tiny, way):
    """Continuations of one prompt, right-padded; a plain hook adds the vector itself."""
    ids = list(tiny.encode(PROMPT).ids)
    tokens = torch.tensor([[*ids, 7, 8, 9], [*ids, 20, 30, 40], [*ids, 7, 3, 3]])

    def added(x, hook):
        x[:, 1:] += 4 * way.unit
        return x

    made = hooks.fwd_hooks(tiny, parse("add(way, 4) at 2", {"way": way}), PROMPT)
    with torch.no_grad():
        plain = tiny.hooked(tokens)
        wanted = tiny.hooked.run_with_hooks(tokens, fwd_hooks=[("blocks.2.hook_resid_post", added)])
        found = tiny.hooked.run_with_hooks(tokens, fwd_hooks=made)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert ((found - plain).abs().amax((1, 2)) > 0.1).all()


def test_scopes_and_heads_in_a_batch(tiny, way):
    head = Direction.of(torch.ones(24), "blocks.1.attn.hook_z.0", "head")
    text = "add(head, 2) at z 1h3 on prompt; clamp(way, 3) at 4 on generated"
    setting = parse(text, {"way": way, "head": head})
    ids = tiny.encode(PROMPT).ids
    tokens = torch.tensor([[*ids, 7, 8], [*ids, 20, 30]])
    last = len(ids) - 1  # predicts the first generated token

    def z(x, hook):
        x[:, 1 : last + 1, 3] += 2 * head.unit
        return x

    def resid(x, hook):
        part = x[:, last:]
        x[:, last:] = part + (3 - part @ way.unit)[..., None] * way.unit
        return x

    plain = [("blocks.1.attn.hook_z", z), ("blocks.4.hook_resid_post", resid)]
    with torch.no_grad():
        wanted = tiny.hooked.run_with_hooks(tokens, fwd_hooks=plain)
        found = tiny.hooked.run_with_hooks(tokens, fwd_hooks=hooks.fwd_hooks(tiny, setting, PROMPT))
    assert torch.allclose(found, wanted, atol=1e-4)


def test_a_sampled_batch_of_one_prompt(tiny, way):
    """Rows of a cached generation part after the prompt; each is steered at every step."""
    ids = torch.tensor([tiny.encode(PROMPT).ids] * 3)
    setting = parse("add(way, 4) at 2", {"way": way})
    made = hooks.fwd_hooks(tiny, setting, PROMPT, cached=True)
    torch.manual_seed(0)
    with tiny.hooked.hooks(fwd_hooks=made):
        out = tiny.hooked.generate(
            ids, max_new_tokens=6, temperature=1.0, verbose=False, prepend_bos=False,
            stop_at_eos=False, output_logits=True,
        )  # fmt: skip
    assert len({tuple(row) for row in out.sequences.tolist()}) == 3
    for row in range(3):
        tokens = out.sequences[row : row + 1, :-1]
        with torch.no_grad():
            whole = tiny.hooked.run_with_hooks(
                tokens, fwd_hooks=hooks.fwd_hooks(tiny, setting, PROMPT)
            )
        assert torch.allclose(out.logits[-1][row], whole[0, -1], atol=1e-4)


@pytest.mark.parametrize("other", ["What is the tallest mountain?", "The quick red fox"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_other_prompts_are_refused(tiny, way, other, side):
    made = hooks.fwd_hooks(tiny, parse("add(way, 4) at 2", {"way": way}), PROMPT)
    tokens = tiny.hooked.to_tokens([PROMPT, other], padding_side=side)
    with pytest.raises(RequestError, match=r"row [01] of the batch does not begin with the"):
        tiny.hooked.run_with_hooks(tokens, fwd_hooks=made)
    assert all(not point.fwd_hooks for point in tiny.hooked.hook_dict.values())


def test_a_bank_takes_a_batch_of_its_size(tiny, way):
    cpu = torch.device("cpu")
    row = Steering(parse("add(way, 4) at 2", {"way": way}), cpu), tiny.encode(PROMPT)
    bank = Operands(cpu).banks([row], [(0, 3)])["resid_post", 2]
    with pytest.raises(RequestError, match="steers 1 rows, the batch has 2"):
        bank.apply(torch.zeros(2, 3, 64))


@pytest.mark.parametrize(
    ("site", "name"),
    [
        ("resid_pre 2", "blocks.2.hook_resid_pre"),
        ("resid_post 2", "blocks.2.hook_resid_post"),
        ("attn_out 0", "blocks.0.hook_attn_out"),
        ("mlp_out 5", "blocks.5.hook_mlp_out"),
        ("z 1h3", "blocks.1.attn.hook_z"),
    ],
)
def test_hooks_carry_the_names_of_transformerlens(tiny, way, site, name):
    head = Direction.of(torch.ones(24), "blocks.1.attn.hook_z.0", "head")
    which = "head" if site.startswith("z") else "way"
    setting = parse(f"add({which}, 4) at {site}", {"way": way, "head": head})
    made = hooks.fwd_hooks(tiny, setting, PROMPT)
    assert [at for at, _ in made] == ["hook_embed", name]
    assert name in tiny.hooked.hook_dict and "blocks.9.hook_resid_pre" not in tiny.hooked.hook_dict
    assert hooks.fwd_hooks(tiny, (), PROMPT) == []
