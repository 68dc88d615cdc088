"""`interp-steer demo`: runs the grid of `data/demo.yaml`, and prints how the best settings answer.

A study chooses one setting; the demo chooses one of each kind: the contrastive direction added, and
a feature added and clamped. So it runs the file's `choose` prompts and its `prove` prompts as two
studies: all settings on the former, the chosen ones, with longer answers, on the latter.
"""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from interp_steer.cli import common
from interp_steer.cli.common import load, table
from interp_steer.util.console import progress, safe

if TYPE_CHECKING:
    import pandas as pd

    from interp_steer.model.model import SteeringModel
    from interp_steer.report.run import Run
    from interp_steer.results.roles import Setting
    from interp_steer.study.study import Study

FILE = Path(__file__).parents[2] / "data" / "demo.yaml"
PANELS = {
    "mention": "answers that name the concept",
    "works": "answers that work: 40 tokens or more, named, no loop, likely",
    "surprise": "surprise (nats a token)",
}
LENGTH = 96  # tokens of the answers that are shown


def demo(
    out: Annotated[
        Path | None, common.opt("Folder for the plot and the answers; by default in the cache.")
    ] = None,
) -> None:
    """Make the starter model talk about the Eiffel Tower.

    It is steered by a contrastive direction, and by a feature of the sparse autoencoder that comes
    with the package. What steers best is chosen on eight prompts, and shown on eight others.
    """
    common.writable_folder("--out", out)
    model = load("starter", None, None)
    from dataclasses import replace

    import pandas as pd

    from interp_steer.report.plots import dose_response
    from interp_steer.results.words import names
    from interp_steer.study.file import StudyFile
    from interp_steer.util.files import cache_dir

    folder = out or cache_dir("runs", "demo")
    study = StudyFile.read(FILE).study(model)
    _screen(model, study)
    tried = _answers(replace(study, choose=(), prove=study.choose).run(model, folder / "choose"))
    tried["works"] = _works(tried)
    columns = [*PANELS, "rep3", "coefficient"]
    means = tried.groupby("setting", sort=False)[columns].mean()
    grid = pd.DataFrame([{**_about(study, s), **means.loc[s[0]]} for s in study.settings])
    # of each kind: most answers that work; then most that name the concept; then the gentlest
    order = grid.sort_values(["works", "mention", "dose"], ascending=[False, False, True])
    best = order.groupby("kind").head(1).sort_index()
    chosen: list[dict[str, Any]] = [
        {str(name): value for name, value in row.items()} for row in best.to_dict("records")
    ]
    for setting in chosen:  # with its length as a number, as the dose is of the prompts before
        setting["steer"] = tried.loc[tried["setting"] == setting["setting"], "steer"].iloc[0]
    plain = tried[tried["role"] == "unsteered"]
    plot = dose_response(
        grid, PANELS, {name: float(plain[name].mean()) for name in PANELS},
        [(s["line"], s["dose"]) for s in chosen], folder / "demo.png",
    )  # fmt: skip

    longer = replace(study.sampling, max_new_tokens=LENGTH)
    lines = [s["steer"] for s in chosen]
    last = replace(study, choose=(), lines=lines, sampling=longer)
    shown = _answers(last.run(model, folder / "show"))
    shown["works"] = _works(shown)
    answers = {(row["prompt"], row["setting"]): row for row in shown.to_dict("records")}
    prompts = [item.text for item in study.prove]
    for number, prompt in enumerate(prompts, 1):
        print(f"\n{number}. {safe(prompt)}")
        for kind, line in [("unsteered", ""), *((s["kind"], s["steer"]) for s in chosen)]:
            text = " ".join(safe(answers[prompt, line]["text"]).split())
            print(textwrap.fill(text, 96, initial_indent=f"   {kind:>9} | ",
                                subsequent_indent=" " * 12 + " | "))  # fmt: skip
    print("\nchosen on other prompts:")
    for setting in chosen:
        print(f"  {setting['kind']:<9} {setting['steer']}, dose {setting['dose']}")
    print()
    rows = []
    for prompt in prompts:
        for label, line in [("unsteered", ""), *((_label(s), s["steer"]) for s in chosen)]:
            answer = answers[prompt, line]
            words = ", ".join(names(answer["text"], study.concept)) or "-"
            rep3, surprise = f"{answer['rep3']:.2f}", f"{answer['surprise']:.2f}"
            rows.append((prompt[:60], label, int(answer["length"]), rep3, surprise, words))
    table(("prompt", "answer", "tokens", "rep3", "surprise", "concept words"), rows)
    print(
        f"\nof {len(prompts)} prompts, answers of 40 tokens or more that name Eiffel, Paris or "
        "France where the unsteered\nanswer does not, with rep3 below 0.2 and surprise below 2.0:"
    )
    for setting in chosen:
        pairs = [(answers[p, setting["steer"]], answers[p, ""]) for p in prompts]
        print(f"  {setting['kind']:<9} {sum(a['works'] and not b['mention'] for a, b in pairs)}")
    print(f"plot and answers: {plot}, {folder / 'choose'}, {folder / 'show'}")


def _answers(run: "Run") -> "pd.DataFrame":
    """A run's table with the line of every setting: the table has a line's parts, the plan it."""
    table = run.table()
    table["setting"] = table["key"].map({one["key"]: one["direction"] for one in run.plan})
    return table


def _screen(model: "SteeringModel", study: "Study") -> None:
    """Prints the features of the starter SAE that fire on the concept, likeliest to steer first."""
    with progress("loading the starter SAE", every=5):
        from interp_steer.features.sae import Sae
        from interp_steer.features.screen import screen
        from interp_steer.labels import import_files, search
        from interp_steer.labels.registry import STARTER
        from interp_steer.results.words import names

        sae = Sae.load("starter", device=model.device)
    import_files([STARTER])
    words = study.concept
    hits = {
        hit.index: hit.label
        for hit in search(" ".join(words), [STARTER], limit=100)
        # a label begins with the words that the feature fires on; its example names many others
        if names(hit.label.split(" (promotes")[0], words)
    }
    print(f"{len(hits)} of {sae.d_sae} features fire on {', '.join(words)}; by output score:")
    for one in sorted(screen(sae, model, list(hits)), key=lambda one: -one.output_score)[:5]:
        print(f"  {one.output_score:.4f}  {one.index:>5}  {safe(hits[one.index])[:80]}")


def _about(study: "Study", setting: "Setting") -> dict[str, Any]:
    """What a setting is called in the plot and in print."""
    (step,) = study.steps(setting)
    name, operator, layer = step.directions[0].name, step.operator, step.sites[0].layer
    kind = "contrast" if name == "eiffel" else operator
    line = f"contrast, block {layer}" if name == "eiffel" else f"{name}, {operator}"
    return {"kind": kind, "line": line, "dose": step.value, "layer": layer, "setting": setting[0]}


def _label(setting: dict[str, Any]) -> str:
    return f"{setting['kind']}, block {setting['layer']}, a {setting['coefficient']:.1f}"


def _works(answers: "pd.DataFrame") -> "pd.Series[bool]":
    """Whether each answer names the concept in 40 tokens or more, does not loop, is likely text."""
    likely = (answers["rep3"] < 0.2) & (answers["surprise"] < 2.0)
    return (answers["length"] >= 40) & (answers["mention"] == 1) & likely
