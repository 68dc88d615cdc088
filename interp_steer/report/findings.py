"""What a run's rows say: effects with intervals, the chosen cell, its controls, a verdict.

Every effect is a difference from the unsteered answer to the same prompt; the prompt is the unit,
its seeds are averaged first. Below ten prompts there are points and no intervals.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp_steer.errors import RequestError
from interp_steer.report.evidence import Evidence
from interp_steer.results.built_in import BUILT_IN
from interp_steer.results.declared import UNKNOWN, Declared, of_manifest
from interp_steer.results.roles import SETTING
from interp_steer.stats import intervals

if TYPE_CHECKING:
    from interp_steer.report.run import Run

ALPHA = 0.05
STATES = {
    "chosen": "",
    "open": "no prompts chose, so no cell is claimed",
    "begun": "no steered row was run yet",
    "unfinished": "rows of the grid are missing",
    "beyond": "no cell stayed within the limits",
    "waiting": "the chosen cell was not run yet",
}
"""How far a run has come, and why nothing is declared there."""


@dataclass(frozen=True)
class Verdict:
    """Whether the chosen cell steers, by the metric that chose it.

    Attributes:
        steers: None where nothing can be declared: too few prompts, no null directions, or none
            that made the same choice while those in the chosen cell do less.
        p: one-sided p against random directions, the choice among cells accounted for; None
            without random directions.
        how: how the choice was accounted for.
        text: one sentence.
    """

    steers: bool | None
    p: float | None
    how: str
    text: str


@dataclass(frozen=True)
class Findings:
    """Tables that a report is made of.

    Attributes:
        grid: every cell x metric on the prompts that choose: `mean`, `unsteered`, `effect` with
            `low` and `high`, which hold for the whole grid at once; `n` prompts, `missing`;
            `best`: not excluded from being the best cell; `passes` the limits; the metric's `unit`.
        claims: chosen cell, sign flip and wrong layer x metric on the prompts that prove: `mean`,
            `mean_low`, `mean_high`, `unsteered`, `effect`, `low`, `high`, `method`, `p` (paired, of
            no effect: McNemar's exact test or sign flips), `n`, `missing`, `mean_missing_zero`
            (the mean with what is missing as 0), `unit`.
        nulls: effect of every null direction x metric on the prompts that prove; NaN where it has
            no value.
        p: control x metric: how the chosen cell's effect compares: `p`, `n` nulls that were run,
            the mean and range of those with a value. By the metric that chose, one-sided; by the
            others, two-sided (|effect|). A null without a value counts as one without effect, and
            one that found no cell within the limits as one that did worse.
        slopes: where a metric was asked at three coefficients or more: mean slope per unit of
            dose (or of coefficient), its interval, and the share of prompts with a negative one
            (steerability, Tan et al. 2024).
        measures: the metrics as the manifest declares them, by name.
        state: a key of `STATES`.
        chosen: the chosen cell's setting, by name of its parts.
        best_layers: layers of the cells that are not excluded from being best.
        notes: what a reader should know.
    """

    table: pd.DataFrame
    manifest: Mapping[str, Any]
    grid: pd.DataFrame
    claims: pd.DataFrame
    nulls: pd.DataFrame
    p: pd.DataFrame
    slopes: pd.DataFrame
    measures: Mapping[str, Declared]
    state: str
    chosen: Mapping[str, str] | None
    best_layers: tuple[int, ...]
    verdict: Verdict
    notes: tuple[str, ...]

    @classmethod
    def of(cls, run: "Run", level: float = 0.95) -> "Findings":
        """Computes all of them from a run.

        Raises:
            RequestError: the run has no unsteered rows yet.
        """
        table, manifest = run.table(), run.manifest
        if not (table["role"] == "unsteered").any():
            raise RequestError(f"{run.folder} has no rows yet; run its study first")
        measures, notes = of_manifest(manifest, BUILT_IN)
        reader = Evidence(table, manifest, run.plan, measures, level)
        grid, best = reader.grid()
        claims, nulls = reader.claims(), reader.nulls()
        p = reader.p(claims, nulls)
        chosen = None
        if reader.state == "chosen":
            (row,) = table[table["role"] == "chosen"].head(1).to_dict("records")
            chosen = {name: str(row[name]) for name in SETTING}
        return cls(
            table,
            manifest,
            grid,
            claims,
            nulls,
            p,
            reader.slopes(),
            measures,
            reader.state,
            chosen,
            tuple(sorted({int(n) for n in best["layer"].dropna()})) if len(best) else (),
            _verdict(reader, claims, p, chosen),
            (*notes, *reader.notes),
        )

    def __str__(self) -> str:
        lines = [self.verdict.text]
        decides = self.manifest["choose_by"]
        for row in self.claims.to_dict("records"):
            if row["role"] == "chosen":
                span = _span(row["low"], row["high"])
                mark = "*" if row["metric"] == decides else " "
                lines.append(
                    f"{mark} {row['metric']:<20} {row['unsteered']:8.3f} -> {row['mean']:8.3f}   "
                    f"effect {row['effect']:+.3f} {span}"
                )
        for row in self.p.to_dict("records"):
            if row["metric"] == decides:
                theirs = f"their mean effect {row['mean']:+.3f}, largest {row['highest']:+.3f}"
                theirs = "none has an effect" if math.isnan(row["mean"]) else theirs
                lines.append(f"  against {row['n']} {row['control']}: {theirs}, p {row['p']:.3f}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        from interp_steer.report.report import body

        html: str = body(self)
        return html


def _verdict(
    evidence: Evidence, claims: pd.DataFrame, p: pd.DataFrame, chosen: Mapping[str, str] | None
) -> Verdict:
    decides = evidence.decides
    if chosen is None:
        return Verdict(None, None, "", f"Nothing is declared: {STATES[evidence.state]}.")
    name = decides.name
    where = ", ".join(v for v in chosen.values() if v)
    mine = claims[claims["metric"] == name] if len(claims) else claims
    mine = mine[mine["role"] == "chosen"] if len(mine) else mine
    if mine.empty or math.isnan(mine.iloc[0]["effect"]):
        how = f"no prompt has a value of {name}, steered and unsteered"
        return Verdict(None, None, how, f"Nothing is declared, as {how}: {where}.")
    one = mine.iloc[0]
    against = {r["control"]: r for r in p[p["metric"] == name].to_dict("records")}
    value, how = _accounted(evidence, against)
    said = f"{name} {one['unsteered']:.3f} -> {one['mean']:.3f} on {int(one['n'])} new prompts"
    if one["low"] is None or math.isnan(one["low"]):
        few = int(one["n"]) < intervals.MINIMUM
        why = f"on fewer than {intervals.MINIMUM} prompts" if few else f"({one['method']})"
        return Verdict(None, value, how, f"Nothing is declared {why}: {where}: {said}.")
    said += f", effect {one['effect']:+.3f} {_span(one['low'], one['high'])}"
    if decides.better == UNKNOWN:
        why = f"the run does not keep which way {name} is better"
        return Verdict(None, value, how, f"Nothing is declared, as {why}: {where}: {said}.")
    good = one["low"] > 0 if decides.better == "high" else one["high"] < 0
    if value is None:
        return Verdict(None, None, how, f"Nothing is declared, as {how}: {where}: {said}.")
    told = f"{where}: {said}; p {value:.3f}, {how}."
    random = against.get("random")
    if good and value > ALPHA and random and "null" not in against and random["p"] <= ALPHA:
        # no fault of the direction: so few null directions cannot tell it from a lucky choice
        count = round(random["p"] * (1 + random["n"])) - 1
        text = (
            f"Moves {name} on new prompts, as {count or 'none'} of {random['n']} random "
            "directions in the same cell did; whether one that chose its own cell would was "
            f"not run (controls: selected): {told}"
        )
        return Verdict(None, value, how, text)
    steers = bool(good) and value <= ALPHA
    return Verdict(steers, value, how, f"{'Steers' if steers else 'Not shown to steer'}: {told}")


def _accounted(
    evidence: Evidence, against: Mapping[Any, Mapping[Any, Any]]
) -> tuple[float | None, str]:
    """(p, how the choice among cells is accounted for in it)."""
    cells = int(evidence.manifest["cells"])
    if "null" in against:
        count = int(against["null"]["n"])
        how = f"{count} random directions made the same choice among {cells} cells"
        without, unknown = evidence.unmeasured()
        if without and evidence.manifest["limits"]:
            some = "none found one" if without == count else f"{without} found none"
            how += f", of which {some} within the limits"
        if unknown:
            how += f"; {unknown} of them are not measured and count as doing as well"
        return float(against["null"]["p"]), how
    if "random" in against:
        at_cell = float(against["random"]["p"])
        how = "the cell was fixed beforehand"
        if cells > 1:
            how = f"Bonferroni over the {cells} cells of the grid (p at the cell {at_cell:.3f})"
        return min(1.0, cells * at_cell), how
    return None, "no random directions were run"


def _span(low: float | None, high: float | None) -> str:
    if low is None or high is None or math.isnan(low):
        return "(no interval)"
    return f"[{low:+.3f}, {high:+.3f}]"
