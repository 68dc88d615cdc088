# %% [markdown]
# What resuming saves in an ablation over all layers: every variant from the kept stream before its
# first changed block, against every variant from the first block on. The same rows, batches and
# scores; the two take turns, so that a busy machine slows both.
#
#     python scripts/benchmarks/ablation.py
#     python scripts/benchmarks/ablation.py --components block --repeats 9 --json

# %%
import argparse
import json
import os
import statistics
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

from interp_steer.causal.ablate import COMPONENTS, ablate
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.item import Item
from interp_steer.util.console import progress

PAIRS = [
    ("The Eiffel Tower stands on the left bank of the river in the city of", " Paris", " Rome"),
    ("When Mary and John went to the store, John gave a bottle of milk to", " Mary", " John"),
    ("In winter the lake freezes over, and the air outside is very", " cold", " hot"),
    ("She opened the old book, turned to the first page and began to", " read", " swim"),
    ("The opposite of up is down, and the opposite of left is", " right", " down"),
    ("Two plus two is four, and three plus three is", " six", " four"),
    ("After a long day at work he took off his shoes and went to", " bed", " Mars"),
    ("Bees fly from flower to flower all summer long and make", " honey", " steel"),
]
SCORES = {"last position": ("logit_difference", "kl_last"), "all positions": ("kl_all", "loss")}
BARS = {"last position": 0.6, "all positions": 0.9}

# %%
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What resuming saves in an ablation.")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--components", nargs="+", default=["attn_out", "mlp_out"])
    parser.add_argument("--prompts", type=int, default=len(PAIRS))
    parser.add_argument("--batch", type=int, default=None, help="rows at once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    given = parser.parse_args()
    if not set(given.components) <= set(COMPONENTS) - {"direction", "feature"}:
        sys.exit(f"error: components are {', '.join(COMPONENTS[:-2])}")
    model = SteeringModel.load(given.model)
    items = [Item(*pair) for pair in PAIRS[: given.prompts]]

    def seconds(scores: tuple[str, ...], resume: bool) -> tuple[float, float]:
        """By the clock, and of processor time, which other jobs disturb less."""
        begun = time.perf_counter(), time.process_time()
        ablate(
            model, items, given.components, scores=scores, resume=resume, batch=given.batch
        )  # fmt: skip
        return time.perf_counter() - begun[0], time.process_time() - begun[1]

    def spread(values: list[float]) -> list[float]:
        return [statistics.median(values), min(values), max(values)]

    found = []
    with progress("ablating", given.repeats * len(SCORES)) as report:
        for name, scores in SCORES.items():
            seconds(scores, True)  # warm-up
            pairs = []
            for repeat in range(given.repeats):
                # whoever comes first has no advantage
                order = [True, False] if repeat % 2 else [False, True]
                times = {resume: seconds(scores, resume) for resume in order}
                pairs.append((times[True], times[False]))
                report(len(found) * given.repeats + repeat + 1)
            found.append(
                {
                    "scores": name,
                    "resumed_s": spread([mine[0] for mine, _ in pairs]),
                    "full_s": spread([theirs[0] for _, theirs in pairs]),
                    "share": spread([mine[0] / theirs[0] for mine, theirs in pairs]),
                    "share_of_processor_time": spread([a[1] / b[1] for a, b in pairs]),
                    "bar": BARS[name],
                }
            )
    if given.json:
        about = {"model": given.model, "layers": model.n_layers, "components": given.components}
        print(json.dumps({**about, "prompts": len(items), "runs": given.repeats, "found": found}))
        sys.exit()
    print(f"{', '.join(given.components)}; {model.n_layers} layers x {len(items)} prompts; median")
    print("(least-most) of runs in turns; a share is resumed / full\n")
    print("| scores | resumed, s | full, s | share | of processor time | bar | faster |")
    print("|---|---|---|---|---|---|---|")
    for one in found:
        kinds = ("resumed_s", "full_s", "share", "share_of_processor_time")
        cells = ["{:.2f} ({:.2f}-{:.2f})".format(*one[kind]) for kind in kinds]
        faster = f"{1 / one['share'][0]:.2f}x"
        print(f"| {one['scores']} | {' | '.join(cells)} | {one['bar']} | {faster} |")
