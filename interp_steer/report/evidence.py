"""Tables of a run: effects with intervals, controls, slopes, and how far it has come."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from interp_steer.results.declared import UNKNOWN, Declared
from interp_steer.results.roles import CAPABILITY, SETTING
from interp_steer.stats import chance, intervals, simultaneous
from interp_steer.stats.interval import MINIMUM, Interval

SINGLE = ("chosen", "flip", "wrong_layer")
QUESTIONS = 200  # of a set of capability, below which its interval is noted to be wide
NULLS = ("random", "features", "shuffled", "null")


class Evidence:
    """A run's table as it is read; see `findings.Findings` for what the tables hold."""

    def __init__(
        self,
        table: pd.DataFrame,
        manifest: Mapping[str, Any],
        plan: Sequence[Mapping[str, Any]],
        measures: Mapping[str, Declared],
        level: float,
    ) -> None:
        questions = table["split"].str.startswith(CAPABILITY.format(""))
        self.asked, table = table[questions], table[~questions]
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
            if int(self.manifest["cells"]) > 1:
                return "open"
            return "waiting" if (self.table["role"] != "unsteered").any() else "begun"
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
            if one.better != UNKNOWN and (told.empty or one.sign * told.mean() < one.sign * limit):
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
            if len(whole) >= MINIMUM:
                bounds = _apart(metric)
                spans = list(
                    simultaneous.bands(whole.to_numpy(), self.level, 0, bounds, metric.kind)
                )
            if metric is self.decides and len(whole):
                best = simultaneous.best_set(metric.sign * whole.to_numpy(), level=self.level)
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
        if rows["item"].nunique() < MINIMUM:
            self.notes.append(
                f"the grid has {rows['item'].nunique()} prompts: it shows points without intervals"
            )
        return grid, grid[grid["best"]].drop_duplicates("cell")

    def claims(self) -> pd.DataFrame:
        lines: list[dict[str, Any]] = []
        for role, rows in self._single():
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

    def _single(self) -> list[tuple[str, pd.DataFrame]]:
        """(role, rows) of what is run once on the held-out prompts: of prompts in place of
        steering, each.
        """
        held_out = self.table[self.table["split"] == "prove"]
        found = [(role, self.table[self.table["role"] == role]) for role in SINGLE]
        told = held_out[held_out["role"] == "prompted"]
        found += [("prompted", part) for _, part in told.groupby("direction", sort=False)]
        return [(role, rows) for role, rows in found if len(rows)]

    def asking(self) -> pd.DataFrame:
        lines: list[dict[str, Any]] = []
        steered = self.table[(self.table["role"] == "chosen") & (self.table["split"] == "prove")]
        for role, rows in self._single():
            if role != "prompted" or steered.empty:
                continue
            for metric in self.metrics:
                after = self._by_item(steered, metric.name)
                other = self._by_item(rows, metric.name).reindex(after.index)
                there = after.notna() & other.notna()
                if not there.any():
                    continue
                difference = self._effect(after[there], other[there], metric)
                lines.append(
                    {
                        "prompting": rows["direction"].iloc[0],
                        "metric": metric.name,
                        "unit": metric.unit,
                        "steered": after[there].mean(),
                        "prompted": other[there].mean(),
                        "difference": difference.estimate,
                        "low": difference.low,
                        "high": difference.high,
                        "method": difference.method,
                        "p": self._paired_p(after[there], other[there], metric),
                        "n": int(there.sum()),
                        "missing": int((~there).sum()),
                    }
                )
        return pd.DataFrame(lines)

    def capability(self) -> pd.DataFrame:
        lines: list[dict[str, Any]] = []
        if "accuracy" not in self.asked:
            return pd.DataFrame(lines)
        for split, answered in self.asked.groupby("split", sort=False):
            small = 0  # questions, where too few were answered by an arm
            plain = answered[answered["role"] == "unsteered"].set_index("item")["accuracy"]
            arms = answered[answered["role"] != "unsteered"]
            for (role, *setting), rows in arms.groupby(["role", *SETTING], sort=False):
                after = rows.set_index("item")["accuracy"]
                there = after.notna() & plain.reindex(after.index).notna()
                if not there.any():
                    continue
                after, before = after[there], plain[after.index[there]]
                one, other = after.to_numpy(bool), before.to_numpy(bool)
                span = self._effect(after, before, self.measures["accuracy"])
                few = len(one) < MINIMUM
                lines.append(
                    {
                        "set": str(split).removeprefix(CAPABILITY.format("")),
                        "role": role,
                        **dict(zip(SETTING, setting, strict=True)),
                        "unsteered": other.mean(),
                        "accuracy": one.mean(),
                        "difference": span.estimate,
                        "low": None if few else span.low,
                        "high": None if few else span.high,
                        "lost": int((other & ~one).sum()),
                        "gained": int((one & ~other).sum()),
                        "p": chance.exact_p(one, other),
                        "n": len(one),
                        "missing": int((~there).sum()),
                    }
                )
                if len(one) < QUESTIONS:
                    small = small or len(one)
            if small:
                self.notes.append(
                    f"{split}: {small} questions; with fewer than {QUESTIONS} an interval is so "
                    "wide that a loss of several points can hide in it"
                )
        return pd.DataFrame(lines)

    def _mean(self, rows: pd.DataFrame, items: "pd.Index[Any]", metric: Declared) -> Interval:
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
        if len(after) < MINIMUM:
            return None
        one, other = after.to_numpy(float), before.to_numpy(float)
        if metric.kind == "rate" and set(np.unique([one, other])) <= {0.0, 1.0}:
            return chance.exact_p(one.astype(bool), other.astype(bool))
        return chance.permutation_p(one, other)

    def nulls(self) -> pd.DataFrame:
        lines = []
        rows = self.table[self.table["role"].isin(NULLS) & (self.table["split"] == "prove")]
        for (role, null), part in rows.groupby(["role", "null"], sort=False):
            for metric in self.metrics:
                effect = self._moved(part, metric).mean()  # NaN where every value is missing
                lines.append({"role": role, "null": null, "metric": metric.name, "effect": effect})
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
                without, unknown = self.unmeasured() if role == "null" else (0, 0)
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
                        "p": chance.p_null(observed, values),
                    }
                )
        columns = ["control", "metric", "n", "mean", "lowest", "highest", "p"]
        return pd.DataFrame(lines, columns=columns)

    def unmeasured(self) -> tuple[int, int]:
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

    def slopes(self) -> pd.DataFrame:
        """Steerability of every direction x operator x site x scope."""
        rows = self.table[(self.table["role"] == "grid")]
        lines = []
        group = ["direction", "operator", "site", "scope"]
        for setting, part in rows.groupby(group, sort=False):
            strength = "dose" if part["dose"].notna().all() else "coefficient"
            if part[strength].isna().any() or part["level"].nunique() < 2:
                continue
            strengths = part.groupby("level")[strength].median()
            for metric in self.metrics:
                if metric.needs != "pair":
                    continue
                levels = part.groupby(["level", "item"])[metric.name].mean().unstack("level")
                levels = levels.set_axis(strengths[levels.columns].to_numpy(float), axis=1)
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
