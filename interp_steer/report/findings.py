"""What a run's rows say: effects with intervals, the chosen cell, its controls, a verdict.

Every effect is a difference from the unsteered answer to the same prompt; the prompt is the unit,
its seeds are averaged first. Below ten prompts there are points and no intervals.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from interp_steer.report.brief import brief
from interp_steer.report.evidence import Evidence
from interp_steer.results.built_in import BUILT_IN
from interp_steer.results.declared import UNKNOWN, Declared, of_manifest
from interp_steer.results.roles import SETTING
from interp_steer.stats.interval import MINIMUM

ALPHA = 0.05
STATES = {
    "chosen": "",
    "open": "there are no selection prompts, so no setting is claimed",
    "begun": "no steered row was run yet",
    "unfinished": "rows of the grid are missing",
    "beyond": "no setting stayed within the limits",
    "waiting": "the chosen setting was not run yet",
}
"""How far a run has come, and why nothing is declared there."""


@dataclass(frozen=True)
class Verdict:
    """Whether the chosen setting steers, by the metric that chose it.

    Attributes:
        steers: True if the interval of the effect lies on the better side of 0 and p <= 0.05;
            False if not; None if this cannot be told, and `text` says why.
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
        asking: prompt in place of steering x metric: the chosen cell less the prompt, paired over
            the held-out prompts: `steered`, `prompted`, `difference`, `low`, `high`, `method`,
            `p`, `n`, `missing`.
        capability: set of questions x arm: accuracy `unsteered` and with the arm, the `difference`
            with `low` and `high` (paired Newcombe), answers `lost` and `gained`, McNemar's exact
            `p`, `n` questions, `missing`.
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
    asking: pd.DataFrame
    capability: pd.DataFrame
    measures: Mapping[str, Declared]
    state: str
    chosen: Mapping[str, str] | None
    best_layers: tuple[int, ...]
    verdict: Verdict
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        table: pd.DataFrame,
        manifest: Mapping[str, Any],
        plan: Sequence[Mapping[str, Any]],
        level: float = 0.95,
    ) -> "Findings":
        """Computes all of them from what `Run` reads; there are unsteered rows in the table."""
        measures, notes = of_manifest(manifest, BUILT_IN)
        reader = Evidence(table, manifest, plan, measures, level)
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
            reader.asking(),
            reader.capability(),
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
        for row in self.asking.to_dict("records"):
            if row["metric"] == decides:
                lines.append(
                    f"  steering less prompt {row['prompting']}: {row['steered']:.3f} - "
                    f"{row['prompted']:.3f} = {row['difference']:+.3f} "
                    f"{_span(row['low'], row['high'])}"
                )
        for row in self.capability.to_dict("records"):
            lines.append(
                f"  {row['set']}: {arm_text(row)} {row['unsteered']:.3f} -> {row['accuracy']:.3f} "
                f"of {row['n']} questions, {row['difference']:+.3f} "
                f"{_span(row['low'], row['high'])}, p {row['p']:.3f}"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        return brief(
            self.verdict.text,
            self.manifest["choose_by"],
            self.grid,
            self.claims,
            self.nulls,
            self.p,
            self.chosen,
            self.notes,
        )


def arm_text(row: Mapping[Any, Any]) -> str:
    """What stands in a table for an arm: its setting, or the prompt's name."""
    return f"prompt {row['direction']}" if row["role"] == "prompted" else setting_text(row)


def setting_text(setting: Mapping[Any, Any]) -> str:
    """A setting as a line of interventions has it, without the direction's hash."""
    if not setting["operator"]:
        return str(setting["direction"])
    level = f", {setting['level']}" if setting["level"] else ""
    scope = f" on {setting['scope']}" if setting["scope"] not in ("", "all") else ""
    return f"{setting['operator']}({setting['direction']}{level}) at {setting['site']}{scope}"


def _verdict(
    evidence: Evidence, claims: pd.DataFrame, p: pd.DataFrame, chosen: Mapping[str, str] | None
) -> Verdict:
    decides = evidence.decides
    if chosen is None:
        return Verdict(None, None, "", f"Nothing is declared: {STATES[evidence.state]}.")
    name, setting = decides.name, setting_text(chosen)
    rows = claims[claims["metric"] == name] if len(claims) else claims
    rows = rows[rows["role"] == "chosen"] if len(rows) else rows
    if rows.empty or math.isnan(rows.iloc[0]["effect"]):
        how = f"no prompt has a value of {name}, steered and unsteered"
        return Verdict(None, None, how, f"Nothing is declared for {setting}, as {how}.")
    claim = rows.iloc[0]
    against = {r["control"]: r for r in p[p["metric"] == name].to_dict("records")}
    value, how = _accounted(evidence, against)
    interval = claim["low"] is not None and not math.isnan(claim["low"])
    span = f" {_span(claim['low'], claim['high'])}" if interval else ""
    result = (
        f"{setting} moves {name} from {claim['unsteered']:.3f} to {claim['mean']:.3f} on "
        f"{int(claim['n'])} held-out prompts (effect {claim['effect']:+.3f}{span})"
    )

    def nothing(why: str) -> Verdict:
        return Verdict(None, value, how, f"Nothing is declared, as {why}: {result}.")

    if not interval:
        few = int(claim["n"]) < MINIMUM
        few_prompts = f"there are fewer than {MINIMUM} prompts"
        return nothing(few_prompts if few else f"there is {claim['method']}")
    if decides.better == UNKNOWN:
        return nothing(f"the run does not keep which way {name} is better")
    if value is None:
        return nothing(how)
    good = claim["low"] > 0 if decides.better == "high" else claim["high"] < 0
    random = against.get("random")
    if good and value > ALPHA and random and "null" not in against and random["p"] <= ALPHA:
        # no fault of the direction: so few null directions cannot tell it from a lucky choice
        count = round(random["p"] * (1 + random["n"])) - 1
        text = (
            f"Not decided: {result}, and {count or 'none'} of {random['n']} random directions in "
            f"the same setting did as much (p {random['p']:.3f}), but no random direction chose "
            f"its own setting (controls: selected), and the choice may be worth that much (p "
            f"{value:.3f} by {how})."
        )
        return Verdict(None, value, how, text)
    steers = bool(good) and value <= ALPHA
    start = "Steers" if steers else "Not shown to steer"
    return Verdict(steers, value, how, f"{start}: {result}, p {value:.3f} ({how}).")


def _accounted(
    evidence: Evidence, against: Mapping[Any, Mapping[Any, Any]]
) -> tuple[float | None, str]:
    """(p, how the choice among cells is accounted for in it)."""
    cells = int(evidence.manifest["cells"])
    if "null" in against:
        count = int(against["null"]["n"])
        how = f"{count} random directions made the same choice among {cells} settings"
        without, unknown = evidence.unmeasured()
        if without and evidence.manifest["limits"]:
            some = "none found one" if without == count else f"{without} found none"
            how += f", of which {some} within the limits"
        if unknown:
            how += f"; {unknown} of them are not measured and count as doing as well"
        return float(against["null"]["p"]), how
    if "random" in against:
        at_cell = float(against["random"]["p"])
        how = "against random directions; the setting was fixed beforehand"
        if cells > 1:
            how = f"Bonferroni over the {cells} settings, p {at_cell:.3f} at this one"
        return min(1.0, cells * at_cell), how
    return None, "no random directions were run"


def _span(low: float | None, high: float | None) -> str:
    if low is None or high is None or math.isnan(low):
        return "(no interval)"
    return f"[{low:+.3f}, {high:+.3f}]"
