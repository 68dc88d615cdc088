"""`interp-steer sweep`: what every setting does to every prompt, as one batch, claiming nothing."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from interp_steer.cli import common
from interp_steer.errors import RequestError
from interp_steer.results.roles import SETTING
from interp_steer.util.console import progress, safe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from interp_steer.report.findings import Findings
    from interp_steer.report.spots import Places
    from interp_steer.study.study import Study

LISTED = 60  # answers on a terminal; the page has all


def sweep(
    steer: Annotated[
        list[str] | None,
        common.opt(
            "Interventions; every value in braces is a setting of its own, as in 'add(joy, "
            "{0.2,0.4} dose) at {8-20/4}'. May be repeated."
        ),
    ] = None,
    model: common.Model = "starter",
    prompt: Annotated[list[str] | None, common.opt("A prompt. May be repeated.")] = None,
    prompts: Annotated[
        Path | None,
        common.opt("File of prompts: .txt, .json, .jsonl or .csv. FILE.csv:COLUMN picks a column."),
    ] = None,
    concept: Annotated[
        str | None, common.opt("Words to look for in the answers, such as 'Eiffel,Paris'.")
    ] = None,
    metrics: Annotated[
        str | None,
        common.opt(
            "What is measured, such as 'kl_last,rep3'. Default: concept if there are words for it, "
            "else kl_mean; rep3; surprise."
        ),
    ] = None,
    prove: Annotated[
        Path | None,
        common.opt(
            "File of held-out prompts. With it the sweep is a study: --prompts choose a setting, "
            "these test it against random directions that choose too."
        ),
    ] = None,
    controls: Annotated[int, common.opt("With --prove: how many random directions.")] = 19,
    named: common.Named = None,
    system: common.System = None,
    text: common.Text = False,
    max_new_tokens: common.MaxNewTokens = 40,
    temperature: common.Temperature = 0.0,
    top_p: common.TopP = 1.0,
    repetition_penalty: common.Penalty = 1.0,
    seed: common.Seed = 0,
    out: Annotated[
        Path | None,
        common.opt("Folder of the rows; a sweep that is there goes on. By default in the cache."),
    ] = None,
    as_json: common.Json = False,
    dtype: common.Dtype = None,
    device: common.Device = None,
    date: common.Date = None,
) -> None:
    """Answer prompts under many settings, by layer and strength.

    Everything is one batch, kept in a folder: run again, it does what is missing. A page shows the
    texts of each setting beside the unsteered ones.
    """
    if not steer:
        raise RequestError("nothing to sweep: give --steer 'add(NAME, {0.2,0.4} dose) at {8-20}'")
    if not prompt and not prompts:
        raise RequestError("nothing to answer: give --prompt or --prompts")
    common.writable_folder("--out", out)
    words = common.words(concept)
    if prove and not (words or metrics):
        raise RequestError(
            "--prove tests what is wanted, and nothing says what that is: give --concept or "
            "--metrics, the deciding one first"
        )
    with progress("starting", every=5):
        from interp_steer.engine.row import Sampling
        from interp_steer.prompts.file import PromptFile
        from interp_steer.steering.directions import Directions
        from interp_steer.study.metrics import find
        from interp_steer.study.study import Study

    fields: dict[str, Any] = {}
    if metrics:
        asked = common.words(metrics)
        texts = any(find(name).needs == "text" for name in asked)
        fields["metrics"] = [*asked, *([] if texts else ["length"])]  # a sweep shows texts
    study = Study.sweep(
        steer,
        [*(prompt or []), *(PromptFile.read(prompts).items() if prompts else [])],
        Directions(named or []),
        prove=PromptFile.read(prove).items() if prove else (),
        controls=controls,
        concept=words,
        sampling=Sampling(temperature, top_p, 0, repetition_penalty, max_new_tokens),
        seeds=(seed,),
        as_chat=False if text else None,
        system=system,
        question=f"What does {' and '.join(steer)} do?",
        **fields,
    )
    common.check_fits(model, map(study.steps, study.settings))
    loaded = common.load(model, dtype, device, date=date)
    folder = out or _folder(study, model, dtype)
    run = study.run(loaded, folder, arguments=sys.argv)
    from interp_steer.report import report as page

    found = run.findings()
    written = page.write(run)
    if as_json:
        common.print_json(
            {
                "folder": str(folder),
                "report": str(written),
                "grid": as_grid(found),
                "verdict": vars(found.verdict) if prove else None,
            }
        )
        return
    print_grid(found)
    if sys.stdout.isatty():
        _print_answers(found)
    print()
    if prove:
        print(safe(str(found)))
    else:
        _offer(bool(words or metrics))
    print(f"rows    {folder}\nreport  {written}")


def _folder(study: "Study", model: str, dtype: str | None) -> Path:
    """Where a sweep lies if nobody says: the same one for the same rows."""
    asked = study.choose or study.prove
    shas = {name: vector.sha for name, vector in study.vectors.items()}
    content = [
        model, dtype, study.lines, shas, [item.id for item in asked], vars(study.sampling),
        study.seeds, study.as_chat, study.system,
    ]  # fmt: skip
    return common.run_folder("-".join(list(shas)[:2]), content)


def as_grid(found: "Findings") -> Any:
    """Every setting by every metric, for JSON."""
    return json.loads(found.grid.to_json(orient="records"))


def print_grid(found: "Findings", metrics: "Sequence[str]" = ()) -> None:
    """The means by site and strength: on a terminal a column a strength, else a line a setting."""
    from interp_steer.report.spots import places, spots

    grid = found.grid
    there = (
        [] if grid.empty else [m for m in grid["metric"].unique() if not metrics or m in metrics]
    )
    if not sys.stdout.isatty():
        means = {(r["cell"], r["metric"]): r["mean"] for r in grid.to_dict("records")}
        settings = grid.drop_duplicates("cell").to_dict("records") if there else []
        rows = [
            (*(r[name] for name in SETTING), *(means[r["cell"], m] for m in there))
            for r in settings
        ]
        common.table((*SETTING, *there), rows)
        return
    by_metric = [places(spots(grid, [metric])) for metric in there]
    for groups in zip(*by_metric, strict=True):  # one group by each metric
        print()
        _print_places(groups[0].name, dict(zip(there, groups, strict=True)), found)


def _print_places(name: str, by_metric: "Mapping[str, Places]", found: "Findings") -> None:
    """One group's settings: the metrics side by side where there is room, else below each other."""
    from rich.console import Console

    width, several = Console().width, list(by_metric.items())
    needed = 6 + sum(2 + max(7, len(m), len(v)) for m, one in several for v in one.levels)
    for some in [several] if needed <= width else [[pair] for pair in several]:
        sites = some[0][1].sites
        heads = [(metric, one, level) for metric, one in some for level in one.levels]
        print(safe(f"{name}; unsteered: {_unsteered(found, [metric for metric, _ in some])}"))
        common.table(
            ("layer", *(f"{m}\n{level}" if level else m for m, _, level in heads)),
            [(site[1], *(_mean(one, site, level) for _, one, level in heads)) for site in sites],
        )


def _unsteered(found: "Findings", metrics: "Sequence[str]") -> str:
    grid = found.grid.drop_duplicates("metric").set_index("metric")["unsteered"]
    return ", ".join(f"{name} {grid[name]:.3f} {found.measures[name].unit}" for name in metrics)


def _mean(group: "Places", site: Any, level: str) -> str:
    spot = group.there.get((site, level))
    mean = None if spot is None else spot.record["mean"]
    return "" if mean is None or mean != mean else f"{mean:.3f}"


def _print_answers(found: "Findings") -> None:
    """The answers to the first prompt, a line each."""
    from rich.console import Console

    from interp_steer.report.spots import places, spots

    table = found.table
    rows = table[(table["role"] == "grid") & table["text"].notna()]
    if rows.empty:
        return
    first = rows["item"].iloc[0]
    rows = rows[rows["item"] == first]
    texts = {tuple(str(r[name]) for name in SETTING): r["text"] for r in rows.to_dict("records")}
    before = table[(table["role"] == "unsteered") & (table["item"] == first)]
    shown = [("unsteered", text) for text in before["text"].head(1)]
    groups = places(spots(found.grid, [str(found.grid["metric"].iloc[0])]))
    for group in groups:
        start = f"{group.name} " if len(groups) > 1 else ""
        for level in group.levels:
            for site in group.sites:
                if spot := group.there.get((site, level)):
                    key = tuple(str(spot.record[name]) for name in SETTING)
                    shown.append((f"{start}{site[1]:>2} {level}", texts.get(key, "")))
    width, longest = Console().width, max(len(name) for name, _ in shown)
    room = max(20, width - longest - 3)
    print(safe(f"\nTo {str(rows['prompt'].iloc[0])[: width - 20]!r} it answers:"))
    for name, answer in shown[: LISTED + 1]:
        line = " ".join(safe(str(answer)).split())
        print(f"{name:<{longest}}  {line if len(line) <= room else line[: room - 1] + '…'}")
    if len(shown) > LISTED + 1:
        print(f"... and {len(shown) - LISTED - 1} more, in the page")


def _offer(stated: bool) -> None:
    """The command that turns a sweep into a study."""
    words = ["interp-steer", *sys.argv[1:], *([] if stated else ["--concept", "WORDS"])]
    print("This shows every setting and claims none. To test the best one on other prompts:")
    print(safe(f"  {shlex.join([*words, '--prove', 'HELD_OUT.txt'])}"))
