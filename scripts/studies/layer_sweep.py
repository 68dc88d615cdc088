# %% [markdown]
# # Which layer, how strong?
# A contrastive direction added at every layer with eight doses, on four prompts: one plan, one file
# that resumes, one report. The best cell is then tried on other prompts beside its controls.
#
# With the data folder of this field's papers (`INTERP_STEER_DATA`, by default `../shared/data`) the
# prompts are the article's AlpacaEval split, else questions of our own.

# %% settings
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

from interp_steer import Contrast, Controls, Sampling, SteeringModel, Study, read_items

SMALL = "--small" in sys.argv  # a minute, to see that it runs
MODEL, DTYPE = os.environ.get("MODEL", "starter"), os.environ.get("DTYPE")
HERE = Path(__file__).parent if "__file__" in globals() else Path("scripts/studies").resolve()
ROOT = HERE.parents[1]
TEXTS = HERE / "texts"
DATA = Path(os.environ.get("INTERP_STEER_DATA", ROOT.parent / "shared" / "data"))
RUN = Path(os.environ.get("RUN", ROOT / "cache" / "runs" / "layer_sweep"))

# %% prompts: what chooses is never what proves
alpaca = DATA / "alpaca_eval"
if alpaca.is_dir():
    choose = read_items(alpaca / "alpaca_train_prompts_402.json")[:4]
    prove = read_items(alpaca / "alpaca_eval_prompts_403.json")[:12]
else:
    questions = read_items(TEXTS / "questions.txt")
    choose, prove = questions[:4], questions[4:16]
sides = ROOT / "interp_steer" / "data" / "demo_texts"
positive, negative = (read_items(sides / f"{side}.txt") for side in ("positive", "negative"))

# %% the model and the direction, for every layer from one pass
model = SteeringModel.load(MODEL, dtype=DTYPE)
eiffel = Contrast.measure(model, [i.prompt for i in positive], [i.prompt for i in negative])

# %% the study
last = model.n_layers - 1
study = Study(
    question="At which layer and dose does the Eiffel direction make the model name the concept?",
    build=[*positive, *negative],
    choose=choose[:2] if SMALL else choose,
    prove=prove[:2] if SMALL else prove,
    neutral=read_items(TEXTS / "neutral.txt"),
    directions={"eiffel": eiffel},
    sites=[1, 2] if SMALL else f"each 0-{last}",
    coefficients=[
        f"{dose} dose"
        for dose in ((0.3, 0.6) if SMALL else (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0))
    ],
    scopes="prompt",
    concept=["Eiffel", "Paris", "France"],
    metrics=["concept", "rep3", "surprise", "loss"],
    limits={"rep3": 0.2},
    sampling=Sampling(repetition_penalty=1.1, max_new_tokens=8 if SMALL else 64),
    controls=Controls(random=2, shuffled=2) if SMALL else Controls(random=20, shuffled=20),
)

# %% run it; start it again after a crash and it goes on
run = study.run(model, RUN)
findings = run.findings()
print(findings)

# %% the report, and the table for your own plots
from interp_steer.report import report

print(report.write(run))
run.save(RUN / "table.csv")
findings  # noqa: B018  # in a notebook: tables and plots
