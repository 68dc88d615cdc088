"""What a run's rows say: effects with intervals, the chosen cell, its controls, a verdict.

Every effect is a difference from the unsteered answer to the same prompt; the prompt is the unit,
its seeds are averaged first. Below ten prompts there are points and no intervals.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp_steer import intervals
from interp_steer.cell import SETTING
from interp_steer.declared import UNKNOWN, Declared, of_manifest
from interp_steer.errors import RequestError
from interp_steer.intervals import Interval
from interp_steer.metrics import BUILT_IN

if TYPE_CHECKING:
    from interp_steer.runs import Run

ALPHA = 0.05
NULLS = ("random", "features", "shuffled", "null")
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
        reader = _Reader(table, manifest, run.plan, measures, level)
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
            reader.verdict(claims, p, chosen),
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
        from interp_steer.report import body

        html: str = body(self)
        return html


class _Reader:
    def __init__(
        self,
        table: pd.DataFrame,
        manifest: Mapping[str, Any],
        plan: Sequence[Mapping[str, Any]],
        measures: Mapping[str, Declared],
        level: float,
    ) -> None:
        self.table, self.manifest, self.plan, self.level = table, manifest, plan, level
        self.measures, self.metrics = measures, list(measures.values())
        self.decides = measures[manifest["choose_by"]]
        self.notes: list[str] = []
        unsteered = table[table["role"] == "unsteered"]
        self.before = unsteered.groupby("item", sort=False)[list(measures)].mean()

    @cached_property
    def state(self) -> str:
        """How far the run has come."""
        if (self.table["role"] == "chosen").any():
            return "chosen"
        if not self.manifest["prompts"]["choose"]:
            return "begun" if int(self.manifest["cells"]) == 1 else "open"
        rows = self.table[self.table["role"].isin(["grid", "null_grid"])]
        if rows.empty:
            return "begun"
        if len(rows) < sum(one["role"] in ("grid", "null_grid") for one in self.plan):
            return "unfinished"
        cells = [part for _, part in self._cells()]
        return "waiting" if any(map(self._passes, cells)) else "beyond"

    def _cells(self) -> list[tuple[Any, pd.DataFrame]]:
        """(setting, rows) of every cell of the grid."""
        rows = self.table[self.table["role"] == "grid"]
        return list(rows.groupby(list(SETTING), sort=False))

    def _passes(self, rows: pd.DataFrame) -> bool:
        """Whether a cell stays within the limits, as the choice sees it."""
        for name, limit in self.manifest["limits"].items():
            one, told = self.measures[name], rows[name].dropna()
            if one.better != UNKNOWN and (
                told.empty or one.sign * told.mean() < one.sign * limit
            ):
                return False
        return True

    def _by_item(self, rows: pd.DataFrame, metric: str) -> "pd.Series[float]":
        """The metric of each prompt, its seeds averaged; NaN where all are missing."""
        return rows.groupby("item", sort=False)[metric].mean()

    def _moved(self, rows: pd.DataFrame, metric: Declared) -> "pd.Series[float]":
        """Steered - unsteered of each prompt."""
        after = self._by_item(rows, metric.name)
        return after - self.before[metric.name].reindex(after.index)

    def grid(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        rows = self.table[self.table["role"] == "grid"]
        if rows.empty:
            return pd.DataFrame(), pd.DataFrame()
        cells = self._cells()
        lines: list[dict[str, Any]] = []
        best: list[int] = []
        for metric in self.metrics:
            moved = pd.DataFrame(
                {i: self._moved(part, metric) for i, (_, part) in enumerate(cells)}
            )
            if moved.isna().all(axis=None):
                continue
            whole = moved.dropna()
            spans: list[Interval | None] = [None] * len(cells)
            if len(whole) >= intervals.MINIMUM:
                bounds = _apart(metric)
                spans = list(intervals.bands(whole.to_numpy(), self.level, 0, bounds, metric.kind))
            if metric is self.decides and len(whole):
                best = intervals.best_set(metric.sign * whole.to_numpy(), level=self.level)
            for i, (setting, part) in enumerate(cells):
                told = moved[i].dropna()
                span = spans[i]
                values = self._by_item(part, metric.name)
                lines.append(
                    {
                        **dict(zip(SETTING, setting, strict=True)),
                        "cell": i,
                        "layer": part["layer"].iloc[0],
                        "coefficient": part["coefficient"].iloc[0],
                        "dose": part["dose"].iloc[0],
                        "metric": metric.name,
                        "unit": metric.unit,
                        "mean": values.mean(),
                        "unsteered": self.before[metric.name].reindex(values.index).mean(),
                        "effect": told.mean() if len(told) else math.nan,
                        "low": span.low if span else None,
                        "high": span.high if span else None,
                        "n": len(told),
                        "missing": int(moved[i].isna().sum()),
                    }
                )
        if not lines:  # every value is missing
            return pd.DataFrame(), pd.DataFrame()
        grid = pd.DataFrame(lines)
        grid["best"] = grid["cell"].isin(best)
        passing = [i for i, (_, part) in enumerate(cells) if self._passes(part)]
        grid["passes"] = grid["cell"].isin(passing)
        if rows["item"].nunique() < intervals.MINIMUM:
            self.notes.append(
                f"the grid has {rows['item'].nunique()} prompts: it shows points without intervals"
            )
        return grid, grid[grid["best"]].drop_duplicates("cell")

    def claims(self) -> pd.DataFrame:
        lines: list[dict[str, Any]] = []
        for role in ("chosen", "flip", "wrong_layer"):
            rows = self.table[self.table["role"] == role]
            if rows.empty:
                continue
            for metric in self.metrics:
                after = self._by_item(rows, metric.name)
                before = self.before[metric.name].reindex(after.index)
                # items that cannot be asked this metric are not missing: unsteered has none either
                asked = [metric.name in self.before and not np.isnan(v) for v in before]
                after, before = after[asked], before[asked]
                if after.empty:
                    continue
                there = after.notna()
                mean = self._mean(rows, after.index, metric)
                effect = self._effect(after[there], before[there], metric)
                lines.append(
                    {
                        **{name: rows[name].iloc[0] for name in SETTING},
                        "role": role,
                        "layer": rows["layer"].iloc[0],
                        "coefficient": rows["coefficient"].iloc[0],
                        "dose": rows["dose"].iloc[0],
                        "metric": metric.name,
                        "unit": metric.unit,
                        "mean": mean.estimate,
                        "mean_low": mean.low,
                        "mean_high": mean.high,
                        "unsteered": before.mean(),
                        "effect": effect.estimate,
                        "low": effect.low,
                        "high": effect.high,
                        "method": effect.method,
                        "p": self._paired_p(after[there], before[there], metric),
                        "n": int(there.sum()),
                        "missing": int((~there).sum()),
                        "mean_missing_zero": float(after.fillna(0.0).mean()),
                    }
                )
        return pd.DataFrame(lines)

    def _mean(
        self, rows: pd.DataFrame, items: "pd.Index[Any]", metric: Declared
    ) -> Interval:
        told = rows[rows["item"].isin(items)].dropna(subset=[metric.name])
        numbers, units = told[metric.name].to_numpy(float), list(told["item"])
        if not len(numbers):
            return Interval(math.nan, None, None, 0, "no values", self.level)
        if metric.kind == "rate" and set(np.unique(numbers)) <= {0.0, 1.0}:
            return intervals.rate_by_unit(numbers.astype(bool), units, level=self.level)
        values = intervals.by_unit(numbers, units)
        return intervals.mean(values, self.level, 0, metric.bounds, metric.kind)

    def _effect(
        self, after: "pd.Series[float]", before: "pd.Series[float]", metric: Declared
    ) -> Interval:
        if not len(after):
            return Interval(math.nan, None, None, 0, "no values", self.level)
        one, other = after.to_numpy(float), before.to_numpy(float)
        if metric.kind == "rate":
            return intervals.difference(one, other, kind="rate", level=self.level)
        return intervals.mean(one - other, level=self.level, bounds=_apart(metric))

    def _paired_p(
        self, after: "pd.Series[float]", before: "pd.Series[float]", metric: Declared
    ) -> float | None:
        """Two-sided p of no effect on these prompts."""
        if len(after) < intervals.MINIMUM:
            return None
        one, other = after.to_numpy(float), before.to_numpy(float)
        if metric.kind == "rate" and set(np.unique([one, other])) <= {0.0, 1.0}:
            return intervals.exact_p(one.astype(bool), other.astype(bool))
        return intervals.permutation_p(one, other)

    def nulls(self) -> pd.DataFrame:
        lines = []
        rows = self.table[self.table["role"].isin(NULLS) & (self.table["split"] == "prove")]
        for (role, null), part in rows.groupby(["role", "null"], sort=False):
            for metric in self.metrics:
                effect = self._moved(part, metric).mean()  # NaN where every value is missing
                lines.append(
                    {"role": role, "null": null, "metric": metric.name, "effect": effect}
                )
        return pd.DataFrame(lines, columns=["role", "null", "metric", "effect"])

    def p(self, claims: pd.DataFrame, nulls: pd.DataFrame) -> pd.DataFrame:
        lines = []
        for metric in self.metrics:
            seen = self._observed(claims, metric.name)
            if seen is None:
                continue
            for role in NULLS:
                mine = nulls[(nulls["role"] == role) & (nulls["metric"] == metric.name)]
                effects = mine["effect"].to_numpy(float)
                told, missing = effects[~np.isnan(effects)], int(np.isnan(effects).sum())
                without, unknown = self._unmeasured() if role == "null" else (0, 0)
                count = len(effects) + without + unknown
                if not count:
                    continue
                if missing and metric is self.decides:
                    self.notes.append(
                        f"{missing} of {count} {role} directions have no value in {metric.name}: "
                        "they count as without effect"
                    )
                values = np.nan_to_num(effects)
                if metric is self.decides and metric.better != UNKNOWN:
                    observed, values = metric.sign * seen, metric.sign * values
                else:
                    observed, values = abs(seen), np.abs(values)
                step = 1 + abs(observed)
                values = np.concatenate(
                    [values, [observed - step] * without, [observed + step] * unknown]
                )
                lines.append(
                    {
                        "control": role,
                        "metric": metric.name,
                        "n": count,
                        "mean": told.mean() if len(told) else math.nan,
                        "lowest": told.min() if len(told) else math.nan,
                        "highest": told.max() if len(told) else math.nan,
                        "p": intervals.p_null(observed, values),
                    }
                )
        columns = ["control", "metric", "n", "mean", "lowest", "highest", "p"]
        return pd.DataFrame(lines, columns=columns)

    def _unmeasured(self) -> tuple[int, int]:
        """Null directions that went through the choice and have no rows on the prompts that prove:
        those that found no cell within the limits, and those whose rows are missing.
        """
        mine = self.table[(self.table["role"] == "null") & (self.table["split"] == "prove")]
        ran = {int(n) for n in mine["null"].dropna()}
        chose = {int(one["null"]) for one in self.plan if one["role"] == "null"}
        return max(0, int(self.manifest["selected"]) - len(ran | chose)), len(chose - ran)

    def _observed(self, claims: pd.DataFrame, metric: str) -> float | None:
        if claims.empty:
            return None
        mine = claims[(claims["role"] == "chosen") & (claims["metric"] == metric)]
        return None if mine.empty or mine["effect"].isna().all() else float(mine["effect"].iloc[0])

    def verdict(
        self, claims: pd.DataFrame, p: pd.DataFrame, chosen: Mapping[str, str] | None
    ) -> Verdict:
        if chosen is None:
            return Verdict(None, None, "", f"Nothing is declared: {STATES[self.state]}.")
        name = self.decides.name
        where = ", ".join(v for v in chosen.values() if v)
        mine = claims[claims["metric"] == name] if len(claims) else claims
        mine = mine[mine["role"] == "chosen"] if len(mine) else mine
        if mine.empty or math.isnan(mine.iloc[0]["effect"]):
            how = f"no prompt has a value of {name}, steered and unsteered"
            return Verdict(None, None, how, f"Nothing is declared, as {how}: {where}.")
        one = mine.iloc[0]
        against = {r["control"]: r for r in p[p["metric"] == name].to_dict("records")}
        value, how = self._accounted(against)
        said = f"{name} {one['unsteered']:.3f} -> {one['mean']:.3f} on {int(one['n'])} new prompts"
        if one["low"] is None or math.isnan(one["low"]):
            few = int(one["n"]) < intervals.MINIMUM
            why = f"on fewer than {intervals.MINIMUM} prompts" if few else f"({one['method']})"
            return Verdict(None, value, how, f"Nothing is declared {why}: {where}: {said}.")
        said += f", effect {one['effect']:+.3f} {_span(one['low'], one['high'])}"
        if self.decides.better == UNKNOWN:
            why = f"the run does not keep which way {name} is better"
            return Verdict(None, value, how, f"Nothing is declared, as {why}: {where}: {said}.")
        good = one["low"] > 0 if self.decides.better == "high" else one["high"] < 0
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
        return Verdict(
            steers, value, how, f"{'Steers' if steers else 'Not shown to steer'}: {told}"
        )

    def _accounted(self, against: Mapping[Any, Mapping[Any, Any]]) -> tuple[float | None, str]:
        """(p, how the choice among cells is accounted for in it)."""
        cells = int(self.manifest["cells"])
        if "null" in against:
            count = int(against["null"]["n"])
            how = f"{count} random directions made the same choice among {cells} cells"
            without, unknown = self._unmeasured()
            if without and self.manifest["limits"]:
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

    def slopes(self) -> pd.DataFrame:
        """Steerability of every direction x operator x site x scope."""
        rows = self.table[(self.table["role"] == "grid")]
        lines = []
        group = ["direction", "operator", "site", "scope"]
        for setting, part in rows.groupby(group, sort=False):
            strength = "dose" if part["dose"].notna().all() else "coefficient"
            if part[strength].isna().any() or part[strength].nunique() < 2:
                continue
            for metric in self.metrics:
                if metric.needs != "pair":
                    continue
                levels = part.groupby([strength, "item"])[metric.name].mean().unstack(strength)
                if 0.0 not in levels.columns:
                    levels[0.0] = self.before[metric.name].reindex(levels.index)
                levels = levels.sort_index(axis=1).dropna()
                if levels.shape[1] < 3 or levels.empty:
                    continue
                mean, negative = intervals.steerability(
                    levels.columns.to_numpy(float), levels.to_numpy(float), level=self.level
                )
                lines.append(
                    {
                        **dict(zip(group, setting, strict=True)),
                        "layer": part["layer"].iloc[0],
                        "metric": metric.name,
                        "per": strength,
                        "slope": mean.estimate,
                        "low": mean.low,
                        "high": mean.high,
                        "negative": negative.estimate,
                        "negative_low": negative.low,
                        "negative_high": negative.high,
                        "n": mean.n,
                    }
                )
        return pd.DataFrame(lines)


def _apart(metric: Declared) -> tuple[float, float] | None:
    """What no difference of two values can pass."""
    if metric.bounds is None:
        return None
    width = metric.bounds[1] - metric.bounds[0]
    return -width, width


def _span(low: float | None, high: float | None) -> str:
    if low is None or high is None or math.isnan(low):
        return "(no interval)"
    return f"[{low:+.3f}, {high:+.3f}]"
