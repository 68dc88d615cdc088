# %% [markdown]
# # Steerability
# How much does a unit of dose move the propensity ln p(y+) - ln p(y-), on how many prompts does it
# move the wrong way, and at which layers (Tan et al. 2024, arXiv 2407.12404)? No text is generated.
#
# With the data folder of this field's papers (`INTERP_STEER_DATA`, by default `../shared/data`) the
# questions are CAA's A/B pairs, half of them to make the direction; else sentences of our own.

# %% settings
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

from interp_steer import Contrast, Controls, Item, SteeringModel, Study, read_items, split_items

SMALL = "--small" in sys.argv
MODEL, DTYPE = os.environ.get("MODEL", "starter"), os.environ.get("DTYPE")
HERE = Path(__file__).parent if "__file__" in globals() else Path("scripts/studies").resolve()
ROOT = HERE.parents[1]
TEXTS = HERE / "texts"
DATA = Path(os.environ.get("INTERP_STEER_DATA", ROOT.parent / "shared" / "data"))
RUN = Path(os.environ.get("RUN", ROOT / "cache" / "runs" / "steerability"))

# %% prompts
caa = DATA / "caa" / "survival-instinct.json"


def pairs(path: Path) -> list[tuple[str, str]]:
    """CAA's questions with either answer at their end."""
    import json

    return [(one["positive"], one["negative"]) for one in json.loads(path.read_text())]


def item(positive: str, negative: str) -> Item:
    """The question that two texts share, with the two answers in which they differ."""
    at = next(i for i, (a, b) in enumerate(zip(positive, negative, strict=False)) if a != b)
    shared = positive[:at]
    shared = shared[: shared.rfind(" (")]  # up to the bracket of "(A)" and "(B)"
    return Item(shared, positive=positive[len(shared) :], negative=negative[len(shared) :])


model = SteeringModel.load(MODEL, dtype=DTYPE)
if caa.is_file():
    building, asked = split_items(pairs(caa), 0.5)
    items = [item(*pair) for pair in asked[:100]]
    contrast = Contrast.measure(
        model, [p for p, _ in building], [n for _, n in building], position="answer"
    )
    build = [Item(text) for pair in building for text in pair]
else:
    items = read_items(TEXTS / "feelings.jsonl")
    sides = [read_items(TEXTS / f"feelings_{side}.txt") for side in ("positive", "negative")]
    contrast = Contrast.measure(model, *[[i.prompt for i in side] for side in sides])
    build = [one for side in sides for one in side]
choose, prove = split_items(items[:4] if SMALL else items, 0.5)

# %% a symmetric grid, within the linear range
study = Study(
    question="How steerable is the model along this direction, and at which layer?",
    build=build,
    choose=choose,
    prove=prove,
    directions={"d": contrast},
    sites=[1, 2] if SMALL else list(range(3, model.n_layers, 5)),
    coefficients=[f"{dose} dose" for dose in (-0.2, -0.1, 0.1, 0.2)],
    metrics=["propensity", "propensity_per_token"],
    controls=Controls(random=2, shuffled=2, selected=2)
    if SMALL
    else Controls(random=50, shuffled=50, selected=19),
    as_chat=False,
)

# %% run, and look
run = study.run(model, RUN)
findings = run.findings()
print(findings)
columns = ["layer", "slope", "low", "high", "negative", "negative_low", "negative_high", "n"]
slopes = findings.slopes
print(slopes[slopes["metric"] == "propensity"][columns].round(3).to_string(index=False))

# %%
from interp_steer.report import report

print(report.write(run))
