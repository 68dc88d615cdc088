# %% [markdown]
# # What breaks when a layer is taken out?
# Prompts whose right answer is Paris. Scores: the logit of " Paris" minus that of another capital,
# and the loss on the prompts' own words. Blocks, their parts, and a direction are taken out, one
# layer at a time. Two things are known beforehand: without block 0 nothing works, and the direction
# of the concept matters more to its own prompts than random directions do.

# %% settings
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import numpy as np

from interp_steer import Contrast, SteeringModel, read_items
from interp_steer.causal.ablate import ablate
from interp_steer.report import marks, plots
from interp_steer.stats import chance, intervals, simultaneous

SMALL = "--small" in sys.argv
MODEL = os.environ.get("MODEL", "starter")
HERE = Path(__file__).parent if "__file__" in globals() else Path("scripts/studies").resolve()
ROOT = HERE.parents[1]
RUN = Path(os.environ.get("RUN", ROOT / "cache" / "runs" / "layer_ablation"))
SCORE = "logit_difference"  # of the concept; the loss is of language as such

# %% prompts, model, direction
items = read_items(HERE / "texts" / "landmarks.jsonl")[: 3 if SMALL else None]
model = SteeringModel.load(MODEL)
sides = [
    [i.prompt for i in read_items(ROOT / "interp_steer" / "data" / "demo_texts" / f"{side}.txt")]
    for side in ("positive", "negative")
]
eiffel = Contrast.measure(model, *sides).directions(name="eiffel")

# %% one layer at a time: whole blocks and their two parts
taken = ablate(model, items, ["block", "attn_out", "mlp_out"], ["zero"], scores=[SCORE, "loss"])
profile = taken.summary()
print(
    profile[["component", "layer", "score", "estimate", "low", "high", "n"]]
    .round(2)
    .to_string(index=False)
)
print("wrote", marks.save(plots.profile(profile), RUN / "profile.png"))

# %% which block matters most? a set: all that cannot be excluded from it
for score, sign in (("loss", 1), (SCORE, -1)):
    table = taken.table.query("component == 'block' and score == @score")
    damage = sign * table.pivot(index="item", columns="layer", values="change")
    worst = simultaneous.best_set(damage.to_numpy())
    print(f"blocks that may matter most, by {score}:", [int(damage.columns[i]) for i in worst])

# %% the concept's direction against random ones of equal norm
# Taken out of the stream after one block at a time; the mean over the middle third of blocks, so
# that no layer is chosen. Only on the second half of the prompts: the first was looked at before.
third = model.n_layers // 3
middle = {"layers": range(third, 2 * third), "scores": [SCORE]}
prove = items[len(items) // 2 :]


def lost(vector) -> np.ndarray:
    """What each prompt's logit difference loses without a direction."""
    table = ablate(model, prove, ["direction"], vector=vector, **middle).table
    return -table.groupby("item", sort=False)["change"].mean().to_numpy()


own = lost(eiffel)
others = [lost(eiffel.random(seed)) for seed in range(2 if SMALL else 50)]
means = np.array([one.mean() for one in others])
print("the concept's direction:", intervals.mean(own))
print(f"{len(means)} random ones:   mean {means.mean():.2f}, largest {means.max():.2f}")
print(f"p = {chance.p_null(own.mean(), means):.3f}")
print("paired with their mean:", intervals.difference(own, np.mean(others, axis=0)))
