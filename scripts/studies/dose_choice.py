# %% [markdown]
# # Which dose? A concept's own, one for all, or one of equal damage
# AxBench's protocol (Wu et al. 2025, arXiv 2501.17148) over a list of concepts: selection prompts
# choose a factor for every concept, and the other half of the prompts reports it. Beside it the
# same direction at the one dose that is best for all the *other* concepts, and at the dose of one
# KL (`interp_steer.tune.equal`), that KL too chosen on the other concepts. Differences are paired
# over concepts.
#
# `python scripts/studies/dose_choice.py [--concepts FILE] [--kinds means,word] [--judge URL MODEL]`
#
# A file of concepts has a word a line. Answers are scored by how often they name the concept and
# do not loop; with a judge, by the harmonic mean of its three ratings, as in AxBench. A run that
# was stopped goes on.

# %% settings
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import pandas as pd
from concepts import CONCEPTS, TOLD, means, own_answers, told

from interp_steer import (
    Direction,
    Sampling,
    Scale,
    SteeringModel,
    Study,
    parse,
    read_items,
    resolve,
    split_items,
)
from interp_steer import line as line_of
from interp_steer.features.contexts import windows
from interp_steer.steering.jacobian import word_directions
from interp_steer.tune.endpoint import Endpoint
from interp_steer.tune.equal import equal_kl
from interp_steer.tune.judge import judge
from interp_steer.tune.ratings import Asked

SMALL = "--small" in sys.argv
LAYER = 13
DOSES = (0.1, 0.2, 0.4) if SMALL else (0.08, 0.12, 0.18, 0.25, 0.35, 0.5)
NATS = (0.5,) if SMALL else (0.2, 0.5, 1.0)
LENGTH = 16 if SMALL else 32
METRICS = ("mention", "concept", "rep3", "surprise", "kl_mean")
CHOICES = ("own dose", "one dose", "one KL")
HERE = Path(__file__).parent if "__file__" in globals() else Path("scripts/studies").resolve()
RUN = Path(os.environ.get("RUN", HERE.parents[1] / "cache" / "runs" / "dose_choice"))


def option(flag: str, place: int = 1) -> str:
    """What stands behind a flag, or nothing."""
    return sys.argv[sys.argv.index(flag) + place] if flag in sys.argv else ""


FILE, KINDS = option("--concepts"), (option("--kinds") or "means,word").split(",")
words = Path(FILE).read_text().split() if FILE else CONCEPTS
words = words[: 3 if SMALL else None]
if unknown := set(KINDS) - {"means", "word"}:
    sys.exit(f"kinds {', '.join(sorted(unknown))}; expected means, word or both")
by = Endpoint(option("--judge"), option("--judge", 2)) if option("--judge") else None
score = "score" if by else "concept"

# %% directions
model = SteeringModel.load("starter", dtype="float32")
questions = read_items(HERE / "texts" / "questions.txt")
choose, prove = split_items(questions[:8] if SMALL else questions, 0.5)
activations, said = own_answers(model, words, LAYER)
known: dict[str, Direction] = {}
if "means" in KINDS:
    made = zip(words, means(activations, LAYER), strict=True)
    known |= {f"means_{word}": one for word, one in made}
if "word" in KINDS:
    lens = word_directions(model, words, windows(model, ["\n".join(said)], 128), layers=[LAYER])
    known |= {f"word_{word}": lens[word].directions[LAYER] for word in words}

# %% every direction's doses: those of the grid, and those of one KL
scale = Scale.of(model, [model.encode(item.prompt) for item in choose])


def in_lengths(text: str) -> str:
    """A line with lengths for doses: one dose that was found in two ways is one line."""
    return line_of(resolve(parse(text, known), scale))


lines = {
    (name, f"{dose:g} dose"): in_lengths(f"add({name}, {dose:g} dose) at {LAYER} on prompt")
    for name in known
    for dose in DOSES
}
for nats in NATS:
    unknowns = [f"add({name}, ? dose) at {LAYER} on prompt" for name in known]
    tuned = equal_kl(model, unknowns, choose, known, RUN / "tuned", target=nats, length=LENGTH)
    for name, outcome, line in zip(
        known, tuned.table["outcome"], tuned.table["steer"], strict=True
    ):
        if outcome == "ok":
            lines[name, f"{nats:g} nats"] = in_lengths(line)


# %% what lines do to prompts
def measured(some: list[str], word: str, prompts: list, part: str, **fields) -> pd.DataFrame:
    """The means of every line (by itself), of the unsteered answers and of the prompt's."""
    study = Study.sweep(
        some, prompts, known, concept=(word, f"{word}s"),
        metrics=METRICS if part == "held_out" else ("concept",),
        sampling=Sampling(max_new_tokens=LENGTH), **fields,
    )  # fmt: skip
    run = study.run(model, RUN / part / word)
    rows = run.table()
    if by:
        asked = [Asked(one.prompt, one.text, word) for one in rows.itertuples()]
        rows = rows.join(judge(by, asked, RUN / "judge").table.set_index(rows.index)[["score"]])
    others = ("unsteered", "prompted")
    steered = rows[~rows["role"].isin(others)].groupby("steer", sort=False)
    names = dict(zip(dict.fromkeys(some), (part for _, part in steered), strict=True))
    names |= {role: rows[rows["role"] == role] for role in others}
    columns = [name for name in dict.fromkeys([*METRICS, score]) if name in rows]
    return pd.DataFrame({name: one[columns].mean() for name, one in names.items()}).T


chosen_by = []
for word in words:
    names = [f"{kind}_{word}" for kind in KINDS]
    mine = {key: line for key, line in lines.items() if key[0] in names}
    found = measured(list(mine.values()), word, choose, "choose")
    chosen_by += [
        {"kind": name.split("_")[0], "word": word, "dose": dose, "value": found.at[line, score]}
        for (name, dose), line in mine.items()
    ]
    print(f"{word}: {len(mine)} lines on {len(choose)} selection prompts", flush=True)
grid = pd.DataFrame(chosen_by)

# %% the choices, and what held-out prompts say of them
shown = []
for word in words:
    picked = {}
    for kind in KINDS:
        some = grid[grid["kind"] == kind].pivot(index="dose", columns="word", values="value")
        by_dose = some.loc[[f"{dose:g} dose" for dose in DOSES]]
        by_kl = some.reindex([f"{nats:g} nats" for nats in NATS])[[*words]]
        best = {
            "own dose": by_dose[word].idxmax(),
            "one dose": by_dose.drop(columns=word).mean(axis=1).idxmax(),
            "one KL": by_kl.drop(columns=word).mean(axis=1).idxmax(),
        }  # the lowest, where several are best
        for choice, dose in best.items():
            if line := lines.get((f"{kind}_{word}", dose)):
                picked[kind, choice, dose] = line
    asks = {"prompt": {"system": TOLD.format(word)}}
    found = measured(list(picked.values()), word, prove, "held_out", prompting=asks)
    for (kind, choice, dose), line in picked.items():
        shown.append({"word": word, "arm": f"{kind}, {choice}", "dose": dose, **found.loc[line]})
    for role in ("unsteered", "prompted"):
        shown.append({"word": word, "arm": role, "dose": "", **found.loc[role]})
table = pd.DataFrame(shown)
table.to_csv(RUN / "shown.csv", index=False)

# %% the table, over concepts
print(f"\n{len(words)} concepts, means with 95 % intervals; {len(prove)} held-out prompts each")
print(f"{'':17}{score:24}{'rep3':>6}{'surprise':>10}  {'KL':24}{'its deviation':>14}  chosen")
for arm, some in table.groupby("arm", sort=False):
    ends = some[["rep3", "surprise"]].mean()
    doses = ", ".join(f"{dose} ({n})" for dose, n in some["dose"].value_counts().items() if dose)
    kl = some["kl_mean"].to_numpy(float)
    print(f"{arm:17}{told(some[score].to_numpy(float)):24}{ends['rep3']:6.3f}"
          f"{ends['surprise']:10.3f}  {told(kl):24}{kl.std(ddof=1):14.3f}  {doses}")  # fmt: skip
print("\ndifferences, paired over concepts")
wide = table.pivot(index="word", columns="arm", values=score)
for kind in KINDS:
    for one, other in ((2, 1), (2, 0), (0, 1)):
        arms = [f"{kind}, {CHOICES[n]}" for n in (one, other)]
        apart = (wide[arms[0]] - wide[arms[1]]).dropna().to_numpy(float)
        print(f"  {arms[0]:15} - {arms[1]:15} {told(apart, '+.3f')}  n {len(apart)}")
