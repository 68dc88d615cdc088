"""What is a constant, and what is refused."""

import numpy as np
import pytest
import torch

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row
from interp_steer.errors import RequestError
from interp_steer.export.constant import constants, first_position, with_first
from interp_steer.model.site import Site
from interp_steer.steering.direction import Direction, DirectionSet
from interp_steer.steering.grammar import parse


@pytest.fixture
def known():
    draw = np.random.default_rng(0)
    vectors = {name: draw.normal(size=64) for name in ("joy", "sad")}
    made = {name: Direction.of(v, "blocks.2.hook_resid_post", name) for name, v in vectors.items()}
    layers = [made["joy"].random(n).at(f"blocks.{n}.hook_resid_post") for n in range(6)]
    return {**made, "every": DirectionSet(layers, "every")}


def test_what_meets_at_one_place_is_summed(tiny, known):
    """mlp_out L and resid_pre L+1 are resid_post L; in NumPy."""
    line = (
        "add(joy, 2) at 2 on all+first; add(sad, -3) at mlp_out 2 on all+first; "
        "add(joy, 0.5 raw) at resid_pre 3 on all+first; add(every, 1) at attn_out 1 on all+first"
    )
    found = constants(parse(line, known), tiny)
    joy, sad = known["joy"].vector.numpy(), known["sad"].vector.numpy()
    long = np.linalg.norm(joy)
    expected = joy / long * 2 - 3 * sad / np.linalg.norm(sad) + 0.5 * joy
    assert list(found) == [Site("attn_out", 1), Site("resid_post", 2)]
    assert found[Site("resid_post", 2)].numpy() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(found[Site("attn_out", 1)], known["every"][1].unit)


@pytest.mark.parametrize(("line", "why"), [
    ("add(joy, 2) at 2", "leaves the first position out.*--include-first"),
    ("add(joy, 2) at 2 on generated", "generated is not every position.*add.joy, 2.0. at 2 on all"),
    ("add(joy, 2) at 2 on prompt+first", "not every position"),
    ("clamp(joy, 2) at 2 on all+first", "what clamp adds depends on the activation.*add.joy, 2.0"),
    ("ablate(joy) at 2 on all+first", "what ablate adds depends.*0.3 dose"),
    ("rotate(joy, sad, 30 deg) at 2 on all+first", "what rotate adds depends.*add.joy, 0.3 dose"),
    ("add(joy, 2) at 2 on all+first if cos(joy, 1) > 0", "only if cos"),
    ("add(joy, 2) at 6 on all+first", "layer 6 is out of range"),
    ("add(joy, 1 dose) at 2 on all+first", "has a dose"),
    ("", "no intervention"),
])  # fmt: skip
def test_what_is_no_constant_is_refused_with_what_could_leave(tiny, known, line, why):
    with pytest.raises(RequestError, match=why):
        constants(parse(line, known), tiny)


def test_a_head_has_no_reader(tiny, known):
    known["head"] = Direction.of(torch.ones(24), "blocks.2.attn.hook_z.1", "head")
    with pytest.raises(RequestError, match="rows of o_proj at attn_out"):
        constants(parse("add(head, 2) at z 2h1 on all+first", known), tiny)


def test_the_first_position_is_measured(tiny, known):
    """KL by Hugging Face's logits under both, on the answers of the line as written."""
    steps = parse("add(joy, 6) at 2", known)
    prompts = ["The quick brown fox", "What is the tower?"]
    found = first_position(tiny, steps, prompts)
    kls = []
    for prompt in prompts:
        ids = tiny.encode(prompt).ids
        answer = Engine(tiny).generate([Row(prompt, steps)])[0].token_ids[:32]

        def logits(first, ids=ids, answer=answer):
            def hook(_module, _inputs, out):
                stream = out[0] if isinstance(out, tuple) else out
                moved = stream.clone()
                moved[:, 0 if first else 1 :] += known["joy"].unit * 6
                return (moved, *out[1:]) if isinstance(out, tuple) else moved

            handle = tiny.hf.model.layers[2].register_forward_hook(hook)
            with torch.no_grad():
                values = tiny.hf(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 :]
            handle.remove()
            return values.double().log_softmax(-1)

        mine, other = logits(False), logits(True)
        kls.append((mine.exp() * (mine - other)).sum(-1).mean().item())
    assert found.kl == pytest.approx(np.mean(kls), rel=1e-3)
    assert found.largest == pytest.approx(max(kls), rel=1e-3) and found.prompts == 2
    assert str(with_first(steps)[0].scope) == "all+first"
