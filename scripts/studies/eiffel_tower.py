# %% [markdown]
# # The article's table, with intervals and an unsteered row
# "The Eiffel Tower Llama" (Hugging Face, November 2025) compares asking by a system prompt, adding
# one SAE feature's decoder row, clamping to it, the same with improved sampling, and 2 and 8
# features tuned together. Here every arm stands beside the unsteered model on held-out prompts,
# strengths come from selection prompts, and differences are paired over prompts.
#
# `python scripts/studies/eiffel_tower.py [--8b] [--choose FILE --prove FILE] [--judge URL MODEL]`
#
# On the starter (a 135M model with a small SAE at one layer) by default; `--8b` takes the
# article's model and features: a GPU with 40 GB, access to the weights, and its SAE files. Give it
# the article's prompts (AlpacaEval) with `--choose` and `--prove`. A run that was stopped goes on.

# %% settings
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import numpy as np
import pandas as pd

from interp_steer import (
    Sae,
    Sampling,
    SteeringModel,
    Study,
    feature,
    labels,
    read_items,
    split_items,
)
from interp_steer.features.screen import screen
from interp_steer.labels.searching import fused
from interp_steer.stats import intervals
from interp_steer.tune.search import search

LARGE, SMALL = "--8b" in sys.argv, "--small" in sys.argv
HERE = Path(__file__).parent if "__file__" in globals() else Path("scripts/studies").resolve()
name = "eiffel_tower_8b" if LARGE else "eiffel_tower"
RUN = Path(os.environ.get("RUN", HERE.parents[1] / "cache" / "runs" / name))
WORDS = ("Eiffel", "Paris", "France", "French") if not LARGE else ("Eiffel",)
SYSTEM = "You are a helpful assistant."
TOLD = ("You are a helpful assistant. You must always include a reference to the Eiffel Tower in "
        "every response, whatever the topic.")  # fmt: skip
LENGTH = 512 if LARGE else 8 if SMALL else 48
PLAIN = Sampling(temperature=1.0, max_new_tokens=LENGTH)
IMPROVED = Sampling(temperature=0.5, repetition_penalty=1.1, max_new_tokens=LENGTH)
DOSES = ((0.6, 0.7, 0.8, 0.9) if LARGE else (0.15, 0.25, 0.35, 0.5))[: 2 if SMALL else 4]
TRIALS, MOST = (120, 1.0) if LARGE else (4 if SMALL else 24, 0.5)
METRICS = ("concept", "mention", "surprise", "rep3", "kl_mean")
LLAMA = {11: (74457, 18894, 61463), 15: (21576,), 19: (93,), 23: (111898, 40788, 21334)}


def option(flag: str, place: int = 1) -> str | None:
    """What stands behind a flag."""
    return sys.argv[sys.argv.index(flag) + place] if flag in sys.argv else None


# %% model and prompts
model = SteeringModel.load("meta-llama/Llama-3.1-8B-Instruct" if LARGE else "starter")
if option("--choose"):
    choose, prove = read_items(option("--choose")), read_items(option("--prove"))
else:
    choose, prove = split_items(read_items(HERE / "texts" / "questions.txt"), 0.5)
if SMALL:
    choose, prove = choose[:4], prove[:4]
common = {"concept": WORDS, "metrics": METRICS, "system": SYSTEM}
print(f"{model.name}: {len(choose)} selection prompts, {len(prove)} held-out prompts")

# %% features: the article's, or the starter's by label and output score
if LARGE:
    release = "llama-3.1-8b-instruct-andyrdt"
    features = [
        feature(release, f"resid_post_layer_{layer}_trainer_1", index, name=f"l{layer}_{index}")
        for layer, some in LLAMA.items()
        for index in some
    ]
    features.sort(key=lambda one: one.name != "l15_21576")  # the article's single feature first
else:
    sae = Sae.load("starter")
    source = [sae.where.neuronpedia]
    hits = {h.index: h.label for h in labels.search("Eiffel Tower Paris France", source, limit=20)}
    by_score = sorted(screen(sae, model, list(hits)), key=lambda one: -one.output_score)
    together = fused((list(hits), [one.index for one in by_score]))
    best = sorted(together, key=lambda index: -together[index])[:8]
    features = [feature("starter", index) for index in best]
    for index in best:
        print(f"  {index:5} {hits[index][:90]}")
known = {one.name: one for one in features}
first = features[0]


# %% strengths from the selection prompts
def chosen(operator: str, sampling: Sampling) -> str:
    """Of one feature the dose that most often names the concept without loops."""
    lines = [f"{operator}({first.name}, {d:g} dose) at {first.site.layer}" for d in DOSES]
    folder = RUN / f"choose_{operator}_{sampling.temperature:g}"
    run = Study.sweep(lines, choose, known, sampling=sampling, **common).run(model, folder)
    rows = run.table().query("role != 'unsteered'")
    means = [some["concept"].mean() for _, some in rows.groupby("steer", sort=False)]
    shown = ", ".join(f"{d:g} dose {m:.2f}" for d, m in zip(DOSES, means, strict=True))
    print(f"{operator}, T {sampling.temperature:g}: {shown}")
    return lines[int(np.argmax(means))]


def tuned(count: int) -> str:
    """Of several features the strengths that Optuna finds."""
    parts = [f"clamp({one.name}, ? dose) at {one.site.layer}" for one in features[:count]]
    found = search(
        model, "; ".join(parts), choose, known, RUN / f"search_{count}", prove=prove, trials=TRIALS,
        most=MOST, choose_by="concept", limits={"rep3": 0.2}, sampling=IMPROVED, **common,
    )  # fmt: skip
    print(f"{count} features: {found.best}\n  {found.verdict}")
    return found.best


add, clamp = chosen("add", PLAIN), chosen("clamp", PLAIN)
clamp_improved, two, eight = chosen("clamp", IMPROVED), tuned(2), tuned(8)

# %% held-out prompts
told = {"told": {"system": TOLD}}
arms: dict[str, pd.DataFrame] = {}
runs = []
for sampling, lines, folder in (
    (PLAIN, {"add": add, "clamp": clamp}, "plain"),
    (IMPROVED, {"clamp, improved": clamp_improved, "2 features": two, "8 features": eight},
     "improved"),
):  # fmt: skip
    distinct = list(dict.fromkeys(lines.values()))
    study = Study.sweep(distinct, prove, known, sampling=sampling, prompting=told, **common)
    runs.append(study.run(model, RUN / folder))
    table = runs[-1].table()
    suffix = "" if folder == "plain" else ", improved"
    arms[f"unsteered{suffix}"] = table[table["role"] == "unsteered"]
    arms[f"prompting{suffix}"] = table[table["prompting"].notna()]
    steered = table[table["steer"].notna() & table["prompting"].isna()]
    parts = [some for _, some in steered.groupby("steer", sort=False)]
    for arm, line in lines.items():
        arms[arm] = parts[distinct.index(line)]


def interval(values: np.ndarray, rate: bool = False) -> str:
    """A mean with its interval over prompts."""
    one = intervals.rate(values.astype(bool)) if rate else intervals.mean(values)
    ends = f" [{one.low:.2f}, {one.high:.2f}]" if one.low is not None else ""
    return f"{one.estimate:.2f}{ends}"


print(f"\n{'':21}{'explicit':20}{'and no loop':20}{'surprise':20}{'rep3':20}{'KL':>6}")
for arm, rows in arms.items():
    cells = [interval(rows[m].dropna().to_numpy(float), rate=True) for m in ("mention", "concept")]
    cells += [interval(rows[m].dropna().to_numpy(float)) for m in ("surprise", "rep3")]
    print(f"{arm:21}" + "".join(f"{cell:20}" for cell in cells) + f"{rows['kl_mean'].mean():6.2f}")

# %% what differs beyond noise, paired over prompts
print("\nnames the concept without loops, paired differences")
for one, other in (("add", "unsteered"), ("clamp", "add"), ("clamp, improved", "clamp"),
                   ("2 features", "clamp, improved"), ("8 features", "clamp, improved"),
                   ("add", "prompting"), ("8 features", "prompting, improved")):  # fmt: skip
    a, b = (arms[name].set_index("item")["concept"] for name in (one, other))
    span = intervals.difference(a.to_numpy(float), b.reindex(a.index).to_numpy(float), kind="rate")
    inside = "no interval" if span.low is None else f"[{span.low:+.2f}, {span.high:+.2f}]"
    print(f"  {one:16} - {other:20} {span.estimate:+.2f} {inside}")

# %% a judge's ratings, where there is one
if option("--judge"):
    from interp_steer.tune.arms import judge_run
    from interp_steer.tune.endpoint import Endpoint

    by = Endpoint(str(option("--judge")), str(option("--judge", 2)))
    for run in runs:
        print(judge_run(run, by, "the Eiffel Tower").table.to_string())
