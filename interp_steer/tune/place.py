"""Layer and strength for a concept: three budgets a line, a free filter, halving, one report.

    place = best_place(model, "add(joy, ? dose) at {8-20/2}", prompts, {"joy": joy}, "PLACE",
                       concept=["happy", "glad"], prove=held_out)
    place.line, place.findings().verdict

1. Every line gets the strengths of three KLs (`equal_kl`, no text).
2. All these cells answer the same few selection prompts with the same seeds. Those that loop or are
   unlikely as text are out; of the others a third goes on to more prompts (successive halving,
   Jamieson and Talwalkar 2016), until three are left.
3. An effect has a peak over dose: a parabola through three doses on a logarithmic axis says where.
4. Held-out prompts are read once, for the line that won: beside the unsteered model, random
   directions at its place and strength, and prompts that ask in words. The value by which it won is
   not quoted: it is too high, as the best of many is.

No layer is left out beforehand: of what is cheap nothing predicted the effect (docs/strength.md).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interp_steer.engine.row import Sampling
from interp_steer.errors import RequestError, RunError
from interp_steer.model.model import SteeringModel
from interp_steer.report.findings import Findings
from interp_steer.report.page import as_records
from interp_steer.report.run import Run
from interp_steer.steering.intervention import Vector
from interp_steer.study.cell import Controls
from interp_steer.study.metrics import LOOPS
from interp_steer.study.study import Study
from interp_steer.tune.equal import Trial, equal_kl
from interp_steer.tune.lines import BEFORE, by_line, effect

BUDGETS = (0.05, 0.2, 0.5)  # nats a token
RUNGS = (8, 16)  # selection prompts of the first rungs; the last has all
KEPT = 3  # a rung's best third goes on, and no fewer than so many
UNLIKELY = 1.0  # nats a token above the unsteered answers' surprise
STEP = 1.25  # doses beside the best one
FILTERS = ("rep3", "surprise")


@dataclass(frozen=True, eq=False)
class Place:
    """Where and how strongly, and what that does on held-out prompts.

    Attributes:
        line: what won, its strength as a length.
        strength: in the unit of its line.
        cells: a row for each cell: `line`, `budget`, `strength`, `rung` (the last that it reached),
            `n` prompts, `effect` there, `rep3`, `surprise`, `passes` the filter.
        run: of the held-out prompts.
        notes: what a reader should know, such as a best cell at the edge of what was tried.
    """

    line: str
    strength: float
    cells: pd.DataFrame
    run: Run
    notes: tuple[str, ...]

    def findings(self) -> Findings:
        """On the held-out prompts, with the verdict."""
        return self.run.findings()


def best_place(
    model: SteeringModel,
    lines: str | Sequence[str],
    prompts: Sequence[Any],
    directions: Mapping[str, Vector],
    folder: str | Path,
    *,
    prove: Sequence[Any],
    budgets: Sequence[float] = BUDGETS,
    rungs: Sequence[int] = RUNGS,
    choose_by: str = "",
    controls: int = 19,
    length: int = 64,
    prompting: Mapping[str, Any] | None = None,
    sampling: Sampling | None = None,
    concept: Sequence[str] = (),
    arguments: Sequence[str] = (),
    **fields: Any,
) -> Place:
    """Finds the line and the strength with the largest effect. A run that was killed goes on.

    Args:
        lines: interventions with `?`, as for `equal_kl`; braces stand for many.
        prompts: selection prompts.
        prove: held-out prompts.
        budgets: KLs at which each line is tried, in nats a token.
        rungs: prompts of the first rungs.
        choose_by: the metric whose mean difference from unsteered counts; by default `concept`.
        controls: random directions on the held-out prompts.
        length: tokens of the unsteered answer on which KL is read.
        prompting: as of a study.
        fields: further ones of a study: `system`, `as_chat`, `seeds`.

    Raises:
        RequestError: as `equal_kl` and `Study` do.
        RunError: no line meets a budget, or every cell loops or is unlikely as text.
    """
    folder, metric = Path(folder), choose_by or "concept"
    sampling = sampling or Sampling(max_new_tokens=48)
    if not budgets or len(set(budgets)) < len(budgets):
        raise RequestError(f"budgets are {', '.join(map(str, budgets))}; expected some, each once")
    names = tuple(dict.fromkeys((metric, *FILTERS)))
    more = {"concept": concept, "sampling": sampling, **fields}
    examples = Trial.of(lines, directions, budgets[0], **fields)
    examples.check(prompts, prove)
    some = [one.replace("?", "0.1") for one in examples.lines]
    checked = [
        Study.sweep(some, asked, directions, metrics=names, **more) for asked in (prompts, prove)
    ]
    cells = _tuned(model, lines, prompts, directions, folder, budgets, length, fields)

    def asked_of(texts: Sequence[str], count: int) -> pd.DataFrame:
        study = Study.sweep(texts, prompts[:count], directions, metrics=names, **more)
        return _measured(study.run(model, folder / "cells").table(), texts, metric)

    left, rows = list(cells["cell"]), dict[str, dict[str, Any]]()
    for rung, count in enumerate([*(n for n in rungs if n < len(prompts)), len(prompts)]):
        table = asked_of(left, count)
        for row in as_records(table):
            rows[row["cell"]] = {"rung": rung, "n": count, **row}
        good = table[table["passes"]].sort_values("effect", ascending=False, kind="stable")
        if good.empty:
            raise RunError(
                f"all {len(left)} cells loop (rep3 above {LOOPS:g}) or are more than "
                f"{UNLIKELY:g} nat less likely than unsteered text; take smaller budgets"
            )
        keep = max(KEPT, math.ceil(len(left) / 3))
        left = list(good["cell"][: keep if count < len(prompts) else 1])
    cells = cells.merge(pd.DataFrame(list(rows.values())), on="cell")
    won = cells[cells["cell"] == left[0]].iloc[0]
    line, strength = _refined(won, len(prompts), asked_of)
    report = Study(
        choose=(), prove=prove, directions=checked[-1].vectors, lines=(line,),
        metrics=(*names, "kl_mean"), prompting=prompting or {},
        controls=Controls(random=controls, features=0, shuffled=0, selected=0), **more,
    )  # fmt: skip
    run = report.run(model, folder / "held_out", arguments=arguments)
    return Place(line, strength, cells.drop(columns="cell"), run, _edges(cells, won))


def _tuned(
    model: SteeringModel,
    lines: str | Sequence[str],
    prompts: Sequence[Any],
    directions: Mapping[str, Vector],
    folder: Path,
    budgets: Sequence[float],
    length: int,
    fields: Mapping[str, Any],
) -> pd.DataFrame:
    """Every line at the strengths of the budgets: `line`, `budget`, `strength`, `unit`, `cell`."""
    found = []
    for budget in budgets:
        tuned = equal_kl(
            model, lines, prompts, directions, folder / "tuned", target=budget, length=length,
            **fields,
        ).table  # fmt: skip
        met = tuned[tuned["outcome"] == "ok"]
        found.append(met.assign(budget=budget))
    cells = pd.concat(found, ignore_index=True)
    if cells.empty:
        raise RunError(
            f"no line meets one of the budgets {', '.join(map(str, budgets))}; see `tune` without "
            "--budgets for why"
        )
    texts = [
        line.replace("?", f"{strength:.6g}")
        for line, strength in zip(cells["line"], cells["strength"], strict=True)
    ]
    names = ["line", "budget", "strength", "unit"]
    return cells[names].assign(cell=texts).drop_duplicates("cell", ignore_index=True)


def _measured(table: pd.DataFrame, texts: Sequence[str], metric: str) -> pd.DataFrame:
    """Of each text its mean effect on the metric, and whether it is fit to be read."""
    found = []
    for text, mine in by_line(table, texts, (metric, *FILTERS)).items():
        rep3, surprise = mine["rep3"].mean(), mine["surprise"].mean()
        most = mine[BEFORE.format("surprise")].mean() + UNLIKELY
        found.append(
            {
                "cell": text,
                "effect": effect(mine, metric),
                "rep3": rep3,
                "surprise": surprise,
                "passes": bool(rep3 <= LOOPS and surprise <= most),
            }
        )
    return pd.DataFrame(found)


def _refined(
    won: "pd.Series[Any]", count: int, asked_of: Callable[[Sequence[str], int], pd.DataFrame]
) -> tuple[str, float]:
    """The best dose near that of the cell that won, and its line."""
    line, dose = str(won["line"]), float(won["strength"])

    def at(strength: float) -> str:
        return line.replace("?", f"{strength:.6g}")

    doses = [dose / STEP, dose, dose * STEP]
    table = asked_of([at(d) for d in doses], count).assign(dose=doses)
    peak = vertex(doses, list(table["effect"]))
    if peak is not None and doses[0] < peak < doses[2]:
        more = asked_of([at(peak)], count).assign(dose=[peak])
        table = pd.concat([table, more], ignore_index=True)
    good = table[table["passes"]]
    # of equal ones the gentlest
    good = good.sort_values(["effect", "dose"], ascending=[False, True], kind="stable")
    best = dose if good.empty else float(good["dose"].iloc[0])
    return at(best), best


def vertex(doses: Sequence[float], effects: Sequence[float]) -> float | None:
    """Where a parabola through three points over ln dose has its peak; None without one."""
    x = np.log(np.asarray(doses, dtype=float))
    a, b, _ = np.polyfit(x - x[1], np.asarray(effects, dtype=float), 2)
    return float(math.exp(x[1] - b / (2 * a))) if a < -1e-12 else None


def _edges(cells: pd.DataFrame, won: "pd.Series[Any]") -> tuple[str, ...]:
    """Notes on a winner at the edge of what was tried."""
    notes = []
    budgets, lines = sorted(set(cells["budget"])), list(dict.fromkeys(cells["line"]))
    if len(budgets) > 1 and won["budget"] in (budgets[0], budgets[-1]):
        which = "smallest" if won["budget"] == budgets[0] else "largest"
        notes.append(
            f"the best cell has the {which} of the budgets, {won['budget']:g} nats: the peak may "
            "lie beyond; try more budgets"
        )
    if len(lines) > 2 and won["line"] in (lines[0], lines[-1]):
        which = "first" if won["line"] == lines[0] else "last"
        notes.append(f"the best cell is of the {which} line, {won['line']}: try lines beyond it")
    return tuple(notes)
