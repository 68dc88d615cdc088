"""What a run's rows say: effects with intervals, the chosen cell, its controls, a verdict.

Every effect is a difference from the unsteered answer to the same prompt; the prompt is the unit,
its seeds are averaged first. Below ten prompts there are points and no intervals.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp_steer import intervals
from interp_steer import metrics as measures
from interp_steer.cell import SETTING
from interp_steer.errors import RequestError
from interp_steer.intervals import Interval

if TYPE_CHECKING:
    from interp_steer.runs import Run

ALPHA = 0.05
NULLS = ("random", "features", "shuffled", "null")


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
            `best`: not excluded from being the best cell; `passes` the limits.
        claims: chosen cell, sign flip and wrong layer x metric on the prompts that prove: `mean`,
            `mean_low`, `mean_high`, `unsteered`, `effect`, `low`, `high`, `method`, `p` (paired, of
            no effect: McNemar's exact test or sign flips), `n`, `missing`, `mean_missing_zero`
            (the mean with what is missing as 0: its lower bound).
        nulls: effect of every null direction x metric on the prompts that prove.
        p: control x metric: how the chosen cell's effect compares: `p`, `n` nulls, their mean and
            range. By the metric that chose, one-sided; by the others, two-sided (|effect|).
        slopes: where a metric was asked at three coefficients or more: mean slope per unit of
            dose (or of coefficient), its interval, and the share of prompts with a negative one
            (steerability, Tan et al. 2024).
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
        for module in manifest.get("modules", ()):
            from interp_steer.chunk import load_modules

            load_modules([module])
        reader = _Reader(table, manifest, level)
        grid, best = reader.grid()
        claims, nulls = reader.claims(), reader.nulls()
        p = reader.p(claims, nulls)
        chosen = None
        for row in claims.to_dict("records"):  # a run that was stopped may have but its controls
            if row["role"] == "chosen" and row["metric"] == manifest["choose_by"]:
                chosen = {name: str(row[name]) for name in SETTING}
        verdict = reader.verdict(claims, p, chosen)
        return cls(
            table,
            manifest,
            grid,
            claims,
            nulls,
            p,
            reader.slopes(),
            chosen,
            tuple(sorted({int(n) for n in best["layer"].dropna()})) if len(best) else (),
            verdict,
            tuple(reader.notes),
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
                lines.append(
                    f"  against {row['n']} {row['control']}: their mean effect {row['mean']:+.3f}, "
                    f"largest {row['highest']:+.3f}, p {row['p']:.3f}"
                )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        from interp_steer.report import body

        html: str = body(self)
        return html


class _Reader:
    def __init__(self, table: pd.DataFrame, manifest: Mapping[str, Any], level: float) -> None:
        self.table, self.manifest, self.level = table, manifest, level
        self.metrics = [measures.find(name) for name in manifest["metrics"]]
        self.decides = measures.find(manifest["choose_by"])
        self.notes: list[str] = []
        unsteered = table[table["role"] == "unsteered"]
        names = [m.name for m in self.metrics]
        self.before = unsteered.groupby("item", sort=False)[names].mean()

    def _by_item(self, rows: pd.DataFrame, metric: str) -> "pd.Series[float]":
        """The metric of each prompt, its seeds averaged; NaN where all are missing."""
        return rows.groupby("item", sort=False)[metric].mean()

    def _moved(self, rows: pd.DataFrame, metric: measures.Metric) -> "pd.Series[float]":
        """Steered - unsteered of each prompt."""
        after = self._by_item(rows, metric.name)
        return after - self.before[metric.name].reindex(after.index)

    def grid(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        rows = self.table[self.table["role"] == "grid"]
        if rows.empty:
            return pd.DataFrame(), pd.DataFrame()
        cells = list(rows.groupby(list(SETTING), sort=False))
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
                spans = list(
                    intervals.bands(whole.to_numpy(), level=self.level, bounds=_apart(metric))
                )
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
        grid["passes"] = ~grid["cell"].isin(self._vetoed(grid))
        if rows["item"].nunique() < intervals.MINIMUM:
            self.notes.append(
                f"{rows['item'].nunique()} prompts chose: the grid shows points without intervals"
            )
        return grid, grid[grid["best"]].drop_duplicates("cell")

    def _vetoed(self, grid: pd.DataFrame) -> set[int]:
        out: set[int] = set()
        for name, limit in self.manifest["limits"].items():
            mine = grid[grid["metric"] == name]
            sign = measures.find(name).sign
            beyond = sign * mine["mean"] < sign * limit
            out |= set(mine[beyond | mine["mean"].isna()]["cell"])
        return out

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
        self, rows: pd.DataFrame, items: "pd.Index[Any]", metric: measures.Metric
    ) -> Interval:
        told = rows[rows["item"].isin(items)].dropna(subset=[metric.name])
        numbers, units = told[metric.name].to_numpy(float), list(told["item"])
        if not len(numbers):
            return Interval(math.nan, None, None, 0, "no values", self.level)
        if metric.kind == "rate" and set(np.unique(numbers)) <= {0.0, 1.0}:
            return intervals.rate_by_unit(numbers.astype(bool), units, level=self.level)
        values = intervals.by_unit(numbers, units)
        return intervals.mean(values, level=self.level, bounds=metric.bounds)

    def _effect(
        self, after: "pd.Series[float]", before: "pd.Series[float]", metric: measures.Metric
    ) -> Interval:
        if not len(after):
            return Interval(math.nan, None, None, 0, "no values", self.level)
        one, other = after.to_numpy(float), before.to_numpy(float)
        if metric.kind == "rate":
            return intervals.difference(one, other, kind="rate", level=self.level)
        return intervals.mean(one - other, level=self.level, bounds=_apart(metric))

    def _paired_p(
        self, after: "pd.Series[float]", before: "pd.Series[float]", metric: measures.Metric
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
                moved = self._moved(part, metric).dropna()
                if len(moved):
                    lines.append(
                        {"role": role, "null": null, "metric": metric.name, "effect": moved.mean()}
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
                if not len(effects):
                    continue
                if metric is self.decides:
                    p = intervals.p_null(metric.sign * seen, metric.sign * effects)
                else:
                    p = intervals.p_null(abs(seen), np.abs(effects))
                lines.append(
                    {
                        "control": role,
                        "metric": metric.name,
                        "n": len(effects),
                        "mean": effects.mean(),
                        "lowest": effects.min(),
                        "highest": effects.max(),
                        "p": p,
                    }
                )
        columns = ["control", "metric", "n", "mean", "lowest", "highest", "p"]
        return pd.DataFrame(lines, columns=columns)

    def _observed(self, claims: pd.DataFrame, metric: str) -> float | None:
        if claims.empty:
            return None
        mine = claims[(claims["role"] == "chosen") & (claims["metric"] == metric)]
        return None if mine.empty or mine["effect"].isna().all() else float(mine["effect"].iloc[0])

    def verdict(
        self, claims: pd.DataFrame, p: pd.DataFrame, chosen: Mapping[str, str] | None
    ) -> Verdict:
        name, cells = self.decides.name, int(self.manifest["cells"])
        if chosen is None:
            why = "the grid has no chosen cell yet"
            if self.manifest["prompts"]["choose"] == 0 and cells > 1:
                why = "no prompts chose, so no cell is claimed"
            elif (self.table["role"] == "grid").any():
                why = "no cell stayed within the limits" if self.manifest["limits"] else why
            return Verdict(None, None, "", f"Nothing is declared: {why}.")
        mine = claims[(claims["role"] == "chosen") & (claims["metric"] == name)].iloc[0]
        against = {r["control"]: r for r in p[p["metric"] == name].to_dict("records")}
        value: float | None = None
        how = "no random directions were run"
        planned = int(self.manifest["selected"])
        if planned:
            effects = against.get("null")
            if effects is not None:
                # a null direction that found no cell within the limits has not done better
                count = round(float(effects["p"]) * (1 + int(effects["n"])))
                value = count / (1 + planned)
                how = f"{planned} random directions made the same choice among {cells} cells"
        elif "random" in against:
            at_cell = float(against["random"]["p"])
            value = min(1.0, cells * at_cell)
            how = "the cell was fixed beforehand"
            if cells > 1:
                how = f"Bonferroni over the {cells} cells of the grid (p at the cell {at_cell:.3f})"
        where = ", ".join(v for v in chosen.values() if v)
        said = (
            f"{name} {mine['unsteered']:.3f} -> {mine['mean']:.3f} on {int(mine['n'])} new prompts"
        )
        if mine["low"] is None or math.isnan(mine["low"]):
            few = int(mine["n"]) < intervals.MINIMUM
            why = f"on fewer than {intervals.MINIMUM} prompts" if few else f"({mine['method']})"
            return Verdict(None, value, how, f"Nothing is declared {why}: {where}: {said}.")
        said += f", effect {mine['effect']:+.3f} {_span(mine['low'], mine['high'])}"
        good = mine["low"] > 0 if self.decides.better == "high" else mine["high"] < 0
        if value is None:
            return Verdict(None, None, how, f"Nothing is declared, as {how}: {where}: {said}.")
        told = f"{where}: {said}; p {value:.3f}, {how}."
        if good and value > ALPHA and not planned and float(against["random"]["p"]) <= ALPHA:
            # no fault of the direction: so few null directions cannot tell it from a lucky choice
            text = (
                f"Moves {name} on new prompts, as {int(against['random']['n'])} random directions "
                f"in the same cell do not; whether one that chose its own cell would was not run "
                f"(controls: selected): {told}"
            )
            return Verdict(None, value, how, text)
        steers = bool(good) and value <= ALPHA
        return Verdict(
            steers, value, how, f"{'Steers' if steers else 'Not shown to steer'}: {told}"
        )

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


def _apart(metric: measures.Metric) -> tuple[float, float] | None:
    """What no difference of two values can pass."""
    if metric.bounds is None:
        return None
    width = metric.bounds[1] - metric.bounds[0]
    return -width, width


def _span(low: float | None, high: float | None) -> str:
    if low is None or high is None or math.isnan(low):
        return "(no interval)"
    return f"[{low:+.3f}, {high:+.3f}]"
