# %% [markdown]
# # Cards of features, and how often a card is wrong
# 20 features of the starter SAE, spread evenly over the labelled ones: what a card declares, and
# how long it takes. And random directions, each with the words of one of these features: whatever
# is declared to steer there is a false alarm, and at most 5 % should be.
#
# `python scripts/studies/cards.py [--features N] [--random N]`; a run that was stopped goes on.

# %% settings
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import pandas as pd
import torch
from concepts import auroc, rank_correlation

from interp_steer import Direction, SteeringModel, feature, read_items, split_items
from interp_steer.labels import Store
from interp_steer.labels.label import Source
from interp_steer.tune.card import QUESTIONS, card, dosed, words_of


def count(option: str, default: int) -> int:
    """The number behind an option of the command line."""
    return int(sys.argv[sys.argv.index(option) + 1]) if option in sys.argv else default


FEATURES, RANDOM = count("--features", 20), count("--random", 40)
SETS = 5  # of words for random directions
SOURCE = "smollm2-135m-instruct/13-starter-res-6k"  # labels: interp-steer labels import starter
HERE = Path(__file__).parent if "__file__" in globals() else Path("scripts/studies").resolve()
RUN = Path(os.environ.get("RUN", HERE.parents[1] / "cache" / "runs" / "cards"))

# %% features whose labels have words
model = SteeringModel.load("starter", dtype="float32")
with Store() as store:
    labelled = {i: one for i, one in store.best(Source.parse(SOURCE)).items() if one.label}
usable = [i for i in sorted(labelled) if len(words_of(labelled[i].label)) >= 3]
chosen = [usable[round((n + 0.5) * len(usable) / 20)] for n in range(20)]

# %% random directions with the words of these features
items = read_items(QUESTIONS)
choose, prove = split_items(items, 6 / len(items))
alarms = []
anywhere = Direction.of(torch.ones(model.d_model), "blocks.13.hook_resid_post")
for n in range(RANDOM):
    words = words_of(labelled[chosen[n % SETS]].label)
    # seeds beyond those of the controls; a folder for each set of words, as these have the same
    # controls, which are then run once
    direction = anywhere.random(10_000 + n).named(f"random{n}")
    folder = RUN / f"random_{n % SETS}"
    verdict = dosed(direction, words, choose, prove).run(model, folder).findings().verdict
    alarms.append(bool(verdict.steers))
    print(f"random {n:3} {'STEERS' if verdict.steers else 'not shown':10} p {verdict.p:.3f}",
          flush=True)  # fmt: skip
print(f"\n{sum(alarms)} of {len(alarms)} random directions declared to steer")

# %% their cards
rows = []
for index in chosen[:FEATURES]:
    start = time.perf_counter()
    made = card(model, feature(labelled[index]), RUN / f"feature_{index}")
    took = time.perf_counter() - start
    claim = made.findings.claims.query("role == 'chosen' and metric == 'concept_logprob'").iloc[0]
    rows.append({"feature": index, "words": ", ".join(made.words)[:48], "dose": made.dose,
                 "effect": claim["effect"], "low": claim["low"], "high": claim["high"],
                 "p": made.findings.verdict.p, "steers": made.steers,
                 "output score": made.screened["output_score"], "seconds": took})  # fmt: skip
    print(f"{index:6} {rows[-1]['words']:48} {claim['effect']:+.2f} p {rows[-1]['p']:.3f} "
          f"{'steers' if made.steers else 'not shown':10} {took:4.0f} s", flush=True)  # fmt: skip
if rows:
    table = pd.DataFrame(rows)
    table.to_csv(RUN / "features.csv", index=False)
    print(f"\n{table['steers'].sum()} of {len(table)} declared to steer; "
          f"longest card {table['seconds'].max():.0f} s")  # fmt: skip
    score, effect = (table[name].to_numpy(float) for name in ("output score", "effect"))
    print(f"rank correlation of effect and output score {rank_correlation(score, effect)}")
    if 0 < table["steers"].sum() < len(table):
        print(f"AUROC of the output score for 'steers' {auroc(score, table['steers'].to_numpy())}")
