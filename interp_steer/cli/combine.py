"""`interp-steer combine`: strengths of several directions together."""

import json
from pathlib import Path
from typing import Annotated

from interp_steer.cli import common
from interp_steer.errors import RequestError
from interp_steer.util.console import progress, safe


def combine(
    steer: Annotated[
        str,
        common.opt(
            "Interventions with ? for each unknown strength, as in 'clamp(a, ? dose) at 13; "
            "clamp(b, ? dose) at 13'."
        ),
    ],
    prompts: Annotated[Path, common.opt("Questions that choose (selection).")],
    prove: Annotated[
        Path, common.opt("Other questions, which test the best candidate (held out).")
    ],
    concept: Annotated[
        str | None,
        common.opt("Words such as 'Eiffel,Paris': the share of answers with one counts."),
    ] = None,
    metric: Annotated[
        str | None, common.opt("A metric of studies that counts in place of the words' share.")
    ] = None,
    rep3: Annotated[
        float, common.opt("Largest mean rep3 (loops) with which a candidate can be chosen.")
    ] = 0.2,
    trials: Annotated[int, common.opt("Candidates in all.", min=1)] = 64,
    batch: Annotated[int, common.opt("Candidates at once, as one batch of rows.", min=1)] = 8,
    most: Annotated[float, common.opt("Largest value of an unknown strength.")] = 0.6,
    seed: common.Seed = 0,
    max_new_tokens: common.MaxNewTokens = 40,
    penalty: common.Penalty = 1.0,
    named: common.Named = None,
    system: common.System = None,
    text: common.Text = False,
    model: common.Model = "starter",
    out: Annotated[
        Path | None, common.opt("Folder of journal and rows; what is there goes on.")
    ] = None,
    as_json: common.Json = False,
    dtype: common.Dtype = None,
    device: common.Device = None,
    date: common.Date = None,
) -> None:
    """Find strengths of several directions together, by Optuna.

    Is it worth it? The best candidate stands beside the best single direction on held-out prompts,
    with a paired interval. What was killed goes on where it was.
    """
    words = common.words(concept)
    if not words and metric is None:
        raise RequestError("nothing to search for: give --concept 'words', or --metric")
    common.writable_folder("--out", out)
    with progress("starting", every=5):
        from interp_steer.engine.row import Sampling
        from interp_steer.prompts.file import PromptFile
        from interp_steer.steering.directions import Directions
        from interp_steer.steering.grammar import parse
        from interp_steer.tune.search import search

    choose, held_out = (PromptFile.read(path).items() for path in (prompts, prove))
    known = Directions(named or [])
    common.check_fits(model, [parse(steer.replace("?", "0.1"), known)])
    loaded = common.load(model, dtype, device, date=date)
    content = [steer, model, dtype, [item.id for item in choose], words, metric]
    folder = out or common.run_folder("combine", content)
    found = search(
        loaded, steer, choose, known, folder, prove=held_out, trials=trials, batch=batch, most=most,
        choose_by=metric or "", limits={"rep3": rep3}, seed=seed, concept=words, system=system,
        as_chat=False if text else None,
        sampling=Sampling(max_new_tokens=max_new_tokens, repetition_penalty=penalty),
    )  # fmt: skip
    if as_json:
        common.print_json(
            {
                "folder": str(folder),
                "best": found.best,
                "single": found.single,
                "verdict": found.verdict,
                "gain": found.gain.as_json(),
                "held_out": json.loads(found.shown.to_json(orient="records")),
                "trials": json.loads(found.trials.to_json(orient="records")),
            }
        )
        return
    print(safe(f"together  {found.best}\nsingle    {found.single}\n"))
    shown = found.shown.drop(columns="line")
    common.table(tuple(shown.columns), [tuple(row) for row in shown.itertuples(index=False)])
    passing = int(found.trials["passes"].sum())
    print(f"\n{found.verdict}")
    print(
        f"Means on {len(held_out)} held-out prompts; chosen on {len(choose)} others among "
        f"{len(found.trials)} candidates, of which {passing} stay within rep3 {rep3:g}"
    )
    print(f"rows    {folder}")
