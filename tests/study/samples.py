"""Studies for the tests of this folder, and what a run's folder holds."""

import json
from pathlib import Path

import torch

from interp_steer.engine.row import Sampling
from interp_steer.steering.direction import Direction
from interp_steer.steering.scale import Scale
from interp_steer.study.cell import Controls
from interp_steer.study.study import Study

WORDS = [
    *("fox", "dog", "tower", "rain", "mountain", "fruit"),
    *("brown", "lazy", "quick", "happy", "sad", "assistant"),
]
SCALE = Scale(tuple(float(10 + i) for i in range(7)))


def direction(seed=0, layer=2, name="d"):
    vector = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    return Direction.of(vector, f"blocks.{layer}.hook_resid_post", name)


def study(**changes):
    """A study that runs: 6 cells, 3 prompts that choose, 4 that prove."""
    given = {
        "choose": [f"I love the {w}" for w in WORDS[:3]],
        "prove": [f"Name the {w}, please" for w in WORDS[3:7]],
        "directions": {"d": direction()},
        "sites": "each 1-3",
        "coefficients": ["0.3 dose", "0.6 dose"],
        "metrics": ["rep3", "surprise", "kl_mean", "length"],
        "choose_by": "kl_mean",
        "sampling": Sampling(max_new_tokens=8),
        "controls": Controls(random=3, features=0, shuffled=2),
        "chunk": 7,
    }
    return Study(**{**given, **changes})


def four_cells(**changes):
    """A study that is only declared: a grid of 4 cells."""
    given = {
        "choose": ["The quick brown fox", "I love"],
        "prove": ["What is", "Name three"],
        "directions": {"d": direction()},
        "sites": "each 1-2",
        "coefficients": [1, "0.5 dose"],
        "metrics": "length",
    }
    return Study(**{**given, **changes})


def contents(folder: Path) -> dict[str, str]:
    """Each row's record, to the bit."""
    found: dict[str, str] = {}
    for path in sorted(Path(folder).glob("rows*.jsonl")):
        for text in path.read_text().splitlines()[1:]:
            row = json.loads(text)
            assert row["key"] not in found, "a row twice"
            found[row["key"]] = json.dumps(
                {k: v for k, v in row.items() if k not in ("chunk", "of")}
            )
    return found
