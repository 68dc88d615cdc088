"""`interp-steer tune`: the strength of every line at which it does the same damage."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from interp_steer.cli import common
from interp_steer.errors import RequestError
from interp_steer.util.console import progress, safe

if TYPE_CHECKING:
    from interp_steer.tune.place import Place

LIMITS = {"rep3": 0.2}  # an answer that loops more is no choice


def tune(
    steer: Annotated[
        list[str] | None,
        common.opt(
            "Interventions with ? for the strength, as in 'add(joy, ? dose) at {8-20/2}'. Every "
            "value in braces is a line of its own. May be repeated."
        ),
    ] = None,
    model: common.Model = "starter",
    prompts: Annotated[
        Path | None,
        common.opt("File of selection prompts, which find the strengths: .txt, .json or .csv."),
    ] = None,
    prove: Annotated[
        Path | None,
        common.opt("File of held-out prompts, on which the damage is measured again."),
    ] = None,
    kl: Annotated[
        float,
        common.opt("The damage: mean KL(unsteered || steered) a token of the unsteered answer."),
    ] = 0.2,
    concept: Annotated[
        str | None,
        common.opt(
            "Words such as 'Eiffel,Paris'. With --prove the tuned lines become a study: the "
            "selection prompts choose one by these words, the held-out prompts test it."
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        common.opt(
            "With --concept and --prove: several KLs, such as 0.05,0.2,0.5. Layer and strength are "
            "searched for: every line at each KL, a filter on loops and unlikely text, the best "
            "third to more prompts, the dose refined, one report on held-out prompts."
        ),
    ] = None,
    controls: Annotated[int, common.opt("With --concept: how many random directions.")] = 19,
    tokens: Annotated[
        int, common.opt("Tokens of the unsteered answer on which KL is measured.", min=1)
    ] = 64,
    named: common.Named = None,
    system: common.System = None,
    text: common.Text = False,
    out: Annotated[
        Path | None,
        common.opt("Folder of the rows; what is there goes on. By default in the cache."),
    ] = None,
    as_json: common.Json = False,
    dtype: common.Dtype = None,
    device: common.Device = None,
    date: common.Date = None,
) -> None:
    """Find the strength of every line for one amount of damage.

    Equal doses are not equal damage: compare layers, operators and directions where they move the
    model alike. All lines' strengths are tried as one batch, then closed in on in two or three
    more.
    """
    if not steer:
        raise RequestError("nothing to tune: give --steer 'add(NAME, ? dose) at {8-20/2}'")
    if not prompts:
        raise RequestError("no prompts to find strengths with: give --prompts FILE")
    words = common.words(concept)
    if words and not prove:
        raise RequestError("--concept chooses among the tuned lines: give --prove FILE to test it")
    several = _budgets(budgets)
    if several and not words:
        raise RequestError("--budgets searches for a concept: give --concept 'words'")
    common.writable_folder("--out", out)
    with progress("starting", every=5):
        from interp_steer.engine.row import Sampling
        from interp_steer.prompts.file import PromptFile
        from interp_steer.steering.directions import Directions
        from interp_steer.study.study import Study
        from interp_steer.tune.curve import OUTCOMES
        from interp_steer.tune.equal import Trial, equal_kl

    choose = PromptFile.read(prompts).items()
    held_out = PromptFile.read(prove).items() if prove else ()
    known = Directions(named or [])
    fields: dict[str, Any] = {"system": system, "as_chat": False if text else None}
    trial = Trial.of(steer, known, kl, **fields)
    trial.check([*choose], [*held_out])
    common.check_fits(model, trial.examples)
    loaded = common.load(model, dtype, device, date=date)
    content = [model, dtype, tokens, system, text, [item.id for item in choose]]
    folder = out or common.run_folder("tune", content)
    if several:
        from interp_steer.tune.place import best_place

        place = best_place(
            loaded, steer, choose, known, folder, prove=held_out, budgets=several, concept=words,
            controls=controls, length=tokens, arguments=sys.argv,
            sampling=Sampling(max_new_tokens=tokens, repetition_penalty=1.1), **fields,
        )  # fmt: skip
        _show(place, as_json)
        return
    found = equal_kl(
        loaded, steer, choose, known, folder, target=kl, held_out=held_out, length=tokens, **fields
    )
    run = None
    if words and found.lines:
        study = Study.sweep(
            found.lines, choose, known, prove=held_out, controls=controls, concept=words,
            metrics=("concept", "rep3", "surprise", "kl_mean"), limits=LIMITS,
            sampling=Sampling(max_new_tokens=tokens, repetition_penalty=1.1), **fields,
        )  # fmt: skip
        run = study.run(loaded, folder / "study", arguments=sys.argv)
    if as_json:
        common.print_json(
            {
                "folder": str(folder),
                "lines": json.loads(found.table.to_json(orient="records")),
                "curves": json.loads(found.curves.to_json(orient="records")),
                "verdict": vars(run.findings().verdict) if run else None,
            }
        )
        return
    heads = ["line", "strength", "kl", "kl_p95"] + ["held_out", "low", "high"] * bool(held_out)
    shown = found.table.assign(
        strength=[
            f"{r['strength']:.4g} {r['unit']}" if r["steer"] else r["outcome"]
            for r in found.table.to_dict("records")
        ]
    )
    common.table(tuple(heads), [tuple(row) for row in shown[heads].itertuples(index=False)])
    asked = f"{kl:g} nats a token on {len(choose)} selection prompts, {found.batches} batches"
    print(f"\nKL(unsteered || steered), {asked}; p95 over tokens")
    for outcome in dict.fromkeys(found.table["outcome"]):
        if outcome != "ok":
            print(f"{outcome}: {OUTCOMES[outcome]}")
    for line in found.table.loc[~found.table["monotone"], "line"]:
        print(safe(f"{line}: more than one strength has this KL; the lowest is taken"))
    print(f"rows    {folder}")
    if run:
        from interp_steer.report import report as page

        print()
        print(safe(str(run.findings())))
        print(f"report  {page.write(run)}")
    elif found.lines:
        print(
            f"try   interp-steer generate --model {model} --prompt '...' --steer '{found.lines[0]}'"
        )


def _budgets(text: str | None) -> list[float]:
    """KLs between commas."""
    try:
        return [float(part) for part in common.words(text)]
    except ValueError:
        raise RequestError(f"--budgets is {text!r}, expected such as 0.05,0.2,0.5") from None


def _show(place: "Place", as_json: bool) -> None:
    """What a search for layer and strength found."""
    from interp_steer.report import report as page

    found, cells = place.findings(), place.cells
    if as_json:
        common.print_json(
            {
                "line": place.line,
                "strength": place.strength,
                "cells": json.loads(cells.to_json(orient="records")),
                "verdict": vars(found.verdict),
                "notes": [*place.notes, *found.notes],
                "folder": str(place.run.folder),
            }
        )
        return
    order = cells.sort_values(["rung", "effect"], ascending=False, kind="stable")
    heads = ("line", "budget", "strength", "n", "effect", "rep3", "surprise", "passes")
    told = order[list(heads)].assign(
        strength=[f"{r['strength']:.4g} {r['unit']}" for r in order.to_dict("records")],
        passes=order["passes"].map({True: "yes", False: "no"}),
    )
    common.table(heads, [tuple(row) for row in told.itertuples(index=False)])
    print(safe(f"\nbest    {place.line}"))
    for note in place.notes:
        print(safe(f"note    {note}"))
    print(safe(str(found)))
    print(f"report  {page.write(place.run)}")
