# %% [markdown]
# # Five ways to a concept, at equal damage
# For each of 20 concepts: a difference of means, an SAE feature (chosen by label and output score),
# a word of the Jacobian lens, a random direction, and a prompt that asks for the concept. Strengths
# are those at which KL(unsteered || steered) is `TARGET` nats a token on selection prompts. What is
# shown comes from held-out prompts: how often the answer names the concept, and what it costs.
#
# `python scripts/studies/equal_damage.py [--small]`; a run that was stopped goes on.

# %% settings
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import pandas as pd
import torch
from concepts import CONCEPTS, TOLD, means, own_answers, rank_correlation, told

from interp_steer import (
    Contrast,
    Direction,
    Sae,
    Sampling,
    Scale,
    Site,
    SteeringModel,
    Study,
    feature,
    labels,
    read_items,
    split_items,
)
from interp_steer.features.contexts import windows
from interp_steer.features.screen import output_scores, screen
from interp_steer.labels.searching import fused
from interp_steer.steering.jacobian import word_directions
from interp_steer.steering.separation import separation
from interp_steer.tune.equal import equal_kl

SMALL = "--small" in sys.argv
MODEL, LAYER, SOURCE = "starter", 13, "starter"  # the layer of the starter's SAE
TARGET = 0.5  # nats a token
HERE = Path(__file__).parent if "__file__" in globals() else Path("scripts/studies").resolve()
RUN = Path(os.environ.get("RUN", HERE.parents[1] / "cache" / "runs" / "equal_damage"))
CHOSEN = CONCEPTS[: 3 if SMALL else None]

# %% model and prompts
model = SteeringModel.load(MODEL, dtype="float32")
questions = read_items(HERE / "texts" / "questions.txt")
choose, prove = split_items(questions[:6] if SMALL else questions, 0.5)
hook_point = f"blocks.{LAYER}.hook_resid_post"

# %% differences of means: the model's own answers about a concept, less those about the others
activations, said = own_answers(model, CHOSEN, LAYER)

# %% features by label and output score, words by the Jacobian lens
sae = Sae.load(SOURCE)
texts = windows(model, ["\n".join(said)], 128)
words = word_directions(model, CHOSEN, texts, layers=[LAYER])
directions: dict[str, Direction] = {}
features: dict[str, str] = {}
for n, (word, mean) in enumerate(zip(CHOSEN, means(activations, LAYER), strict=True)):
    directions[f"means_{word}"] = mean
    directions[f"word_{word}"] = words[word].directions[LAYER]
    directions[f"random_{word}"] = Direction.of(torch.ones(model.d_model), hook_point).random(n)
    if hits := labels.search(word, [sae.where.neuronpedia], limit=20):
        scored = screen(sae, model, [hit.index for hit in hits])
        by_score = sorted(scored, key=lambda one: -one.output_score)
        together = fused(([hit.index for hit in hits], [one.index for one in by_score]))
        best = max(together, key=lambda index: together[index])
        directions[f"feature_{word}"] = feature(SOURCE, best)
        features[word] = next(hit.label for hit in hits if hit.index == best)
for word in CHOSEN:
    print(f"{word:10} feature: {features.get(word, 'no label')[:80]}")

# %% strengths of one KL, all directions as one batch
lines = [f"add({name}, ? dose) at {LAYER} on prompt" for name in directions]
tuned = equal_kl(model, lines, choose, directions, RUN / "tuned", target=TARGET, held_out=prove,
                 length=16 if SMALL else 32)  # fmt: skip
table = tuned.table.assign(
    name=list(directions),
    kind=[name.split("_")[0] for name in directions],
    concept=[name.split("_")[1] for name in directions],
)
met = table["outcome"] == "ok"
print(f"\n{met.sum()} of {len(table)} meet {TARGET} nats within 10 % in {tuned.batches} batches "
      f"(all but {(table['batches'] > 3).sum()} in 3 or fewer)")  # fmt: skip
for kind, some in table[met].groupby("kind", sort=False):
    held = told(some["held_out"].to_numpy(float))
    print(f"  {kind:8} dose {some['strength'].median():.2f} (median), held-out KL {held}")

# %% what they say on held-out prompts, beside asking
found = []
for word in CHOSEN:
    mine = table[met & (table["concept"] == word)]
    known = {name: directions[name] for name in mine["name"]}
    study = Study.sweep(
        list(mine["steer"]), prove, known, concept=(word, f"{word}s"),
        metrics=("mention", "concept", "rep3", "surprise", "kl_mean"),
        sampling=Sampling(max_new_tokens=16 if SMALL else 40),
        prompting={"prompt": {"system": TOLD.format(word)}},
    )  # fmt: skip
    rows = study.run(model, RUN / "held_out" / word).table()
    kinds = rows["direction"].str.split("_").str[0].where(rows["role"] != "unsteered", "unsteered")
    means = rows.groupby(kinds)[["mention", "concept", "rep3", "surprise", "kl_mean"]].mean()
    found += [{"word": word, "kind": kind, **row} for kind, row in means.to_dict("index").items()]
shown = pd.DataFrame(found)
shown.to_csv(RUN / "shown.csv", index=False)

# %% the table, over concepts
print(f"\nmeans over concepts with 95 % intervals; {len(prove)} held-out prompts each")
print(f"{'':10}{'n':>3}  {'names the concept':24}{'without loops':24}"
      f"{'rep3':>6}{'surprise':>10}{'KL':>7}")  # fmt: skip
wide = shown.pivot(index="word", columns="kind", values="concept")
for kind in ("unsteered", "prompt", "means", "feature", "word", "random"):
    some = shown[shown["kind"] == kind]
    cells = "".join(f"{told(some[name].to_numpy(float)):24}" for name in ("mention", "concept"))
    ends = some[["rep3", "surprise", "kl_mean"]].mean()
    print(f"{kind:10}{len(some):>3}  {cells}"
          f"{ends['rep3']:6.3f}{ends['surprise']:10.3f}{ends['kl_mean']:7.3f}")  # fmt: skip
print("\ndifferences of naming without loops, paired over concepts")
for one, other in (("means", "word"), ("means", "feature"), ("word", "feature"),
                   ("means", "random"), ("word", "random"), ("feature", "random"),
                   ("prompt", "means"), ("prompt", "word")):  # fmt: skip
    apart = (wide[one] - wide[other]).dropna().to_numpy(float)
    print(f"  {one:8} - {other:8} {told(apart, '+.3f')}  n {len(apart)}")

# %% do cheap numbers predict it?
scale = Scale.of(model, [model.encode(item.prompt) for item in choose])
scored = output_scores(model, list(directions.values()), scale.at(Site("resid_post", LAYER)))
cheap = pd.DataFrame(
    {
        "word": [name.split("_")[1] for name in directions],
        "kind": [name.split("_")[0] for name in directions],
        "output score": scored,
    }
)
for n, word in enumerate(CHOSEN):
    rest = activations[[i for i in range(len(CHOSEN)) if i != n]].mean(0)
    told_apart = separation(Contrast(activations[n][None], rest[None]))[0]
    mine = (cheap["word"] == word) & (cheap["kind"] == "means")
    cheap.loc[mine, ["pairs", "d"]] = [told_apart.pairs, told_apart.d]
together = cheap.merge(shown, on=["word", "kind"])

print("\nrank correlation with naming without loops, over concepts")
for kind, predictor in (("means", "pairs"), ("means", "d"), ("means", "output score"),
                        ("feature", "output score"), ("word", "output score")):  # fmt: skip
    some = together[together["kind"] == kind]
    columns = [some[name].to_numpy(float) for name in (predictor, "concept")]
    print(f"  {kind:8} {predictor:13} {rank_correlation(*columns)}")
