"""Prompts, lines of interventions and directions for the tests of the engine."""

import torch

from interp_steer.prompts.prompt import chat
from interp_steer.steering.direction import Direction, DirectionSet

PROMPTS = (
    chat("Name three fruits."),
    chat("What is the tallest mountain, and who climbed it first?", "You are a helpful assistant."),
    "The quick brown",
)
LINES = (
    "",
    "add(one, 4) at 2",
    "add(set, 3) at 0-5 on generated",
    "add(one, 6) at 5 on last",
    "add_norm_kept(two, 5) at resid_pre 0",
    "clamp(one, 3) at 2; clamp(two, -2) at 2; add(one, 1) at 4",
    "clamp_min(one, 2) at 1 on content",
    "clamp_max(two, -1) at mlp_out 3 on prompt",
    "ablate(one) at attn_out 0-5 + mlp_out 0-5 on all+first",
    "rotate(one, two, 50 deg) at 3 on positions 2-20",
    "angular(one, two, 120 deg) at resid_pre 4",
    "add(head, 2) at z 1h0,1h3; clamp(head, 1) at z 4h2",
    "add(one, 4) at 2 if cos(two, 1) > -1",
    "add(one, 4) at 2 if cos(two, 1) > 0.99",
)


def directions() -> dict[str, Direction | DirectionSet]:
    """Those that the lines name, for the tiny model."""
    draw = torch.Generator().manual_seed(7)

    def random(width: int, hook: str, name: str) -> Direction:
        return Direction.of(torch.randn(width, generator=draw), hook, name)

    return {
        "one": random(64, "blocks.2.hook_resid_post", "one"),
        "two": random(64, "blocks.2.hook_resid_post", "two"),
        "head": random(24, "blocks.1.attn.hook_z.0", "head"),
        "set": DirectionSet(random(64, f"blocks.{n}.hook_resid_post", "set") for n in range(6)),
    }
