"""Strengths of several directions together, found by Optuna.

    best = search(model, "clamp(a, ? dose) at 13; clamp(b, ? dose) at 13; add(c, ? dose) at 19",
                  prompts, directions, "SEARCH", prove=held_out, concept=["Eiffel", "Paris"])

Each `?` is an unknown from 0 to `most`. Candidates are asked for by the tree-structured Parzen
estimator (Bergstra et al. 2011; Optuna, Akiba et al. 2019), a batch of them is one batch of rows,
and all answer the same prompts with the same seeds. The limits are its constraints. What is claimed
comes from held-out prompts: the best candidate beside the best single direction, paired. Of several
directions clamped at one site the targets hold jointly.

Candidates lie in a journal and rows in a folder: a search that was killed goes on to the same
result, and nothing is run twice.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp_steer.errors import RequestError, RunError
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.item import Item
from interp_steer.prompts.parts import check_apart
from interp_steer.stats import intervals
from interp_steer.stats.interval import MINIMUM, Interval
from interp_steer.steering.intervention import Vector
from interp_steer.study import metrics as measures
from interp_steer.study.metrics import LOOPS
from interp_steer.study.study import Study
from interp_steer.tune.lines import BEFORE, by_line, effect
from interp_steer.util.console import progress
from interp_steer.util.locking import running

if TYPE_CHECKING:
    import optuna

DOSES = (0.1, 0.2, 0.3, 0.45, 0.6)  # of each direction alone
TRIALS, BATCH = 64, 8
MOST = 0.6  # of an unknown, in its unit
NOTHING = 0.01  # an unknown below it is left out
LIMITS: Mapping[str, float] = {"rep3": LOOPS}


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found.

    Attributes:
        best: the line of the best candidate on the selection prompts.
        single: the line of the best single direction there; chosen in the same way.
        trials: a row for each candidate: `number`, `line`, the unknowns, `effect` on the selection
            prompts, `passes` the limits.
        shown: on the held-out prompts, a row for each of unsteered, single, best: means of metrics.
        gain: best less single by the metric that chose, paired over held-out prompts.
        verdict: one sentence.
    """

    best: str
    single: str
    trials: pd.DataFrame
    shown: pd.DataFrame
    gain: Interval
    verdict: str

    def _repr_html_(self) -> str:
        from interp_steer.util.html import frame

        return frame(self.shown, self.verdict)


def search(
    model: SteeringModel,
    line: str,
    prompts: Sequence[Any],
    directions: Mapping[str, Vector],
    folder: str | Path,
    *,
    prove: Sequence[Any],
    trials: int = TRIALS,
    batch: int = BATCH,
    most: float = MOST,
    choose_by: str = "",
    limits: Mapping[str, float] = LIMITS,
    seed: int = 0,
    **fields: Any,
) -> Found:
    """Searches for the strengths with the largest effect within the limits.

    Args:
        line: interventions with `?` for every unknown strength.
        prompts: selection prompts, the same for every candidate.
        directions: what the names mean.
        folder: of the journal and the rows.
        prove: held-out prompts.
        trials, batch: candidates in all, and at once.
        most: largest value of an unknown.
        choose_by: the metric whose mean difference from unsteered counts; by default `concept` with
            concept words.
        limits: metric -> the worst mean with which a candidate can be chosen.
        seed: of the sampler.
        fields: further ones of a study: `concept`, `metrics`, `sampling`, `seeds`.

    Raises:
        RequestError: no or one unknown, Optuna is not installed, a folder of another search; or as
            `Study` does.
        RunError: no candidate, or no single direction, stays within the limits.
    """
    optuna = _optuna()
    parts = [part.strip() for part in line.split(";") if part.strip()]
    unknowns = line.count("?")
    if unknowns < 2 or any(part.count("?") > 1 for part in parts):
        raise RequestError(
            f"{line!r} has {unknowns} unknown strengths; expected two or more, one in each "
            "intervention, as in 'add(a, ? dose) at 13; add(b, ? dose) at 13'"
        )
    for name, number in (("trials", trials), ("batch", batch)):
        if type(number) is not int or number < 1:
            raise RequestError(f"{name} is {number!r}, expected at least 1")
    if not 0 < most < math.inf:
        raise RequestError(f"most is {most!r}, expected above 0")
    first = choose_by or ("concept" if fields.get("concept") else "")
    if not first:
        raise RequestError("nothing to search for: give concept words, or choose_by a metric")
    named = fields.pop("metrics", None) or (first, *limits, "surprise", "kl_mean")
    fields["metrics"] = tuple(dict.fromkeys((first, *named, *limits)))
    work = _Work(model, line, parts, prompts, directions, Path(folder), first, limits, fields)
    work.check(prove)
    with running(work.folder / "journal"):
        told = work.trials(optuna, trials, batch, most, seed)
        alone = work.singles([dose for dose in DOSES if dose <= most] or [most])
    best, single = _best(told, "candidate"), _best(alone, "single direction")
    shown, gain = work.shown(best, single, prove)
    return Found(best, single, told, shown, gain, _verdict(first, gain))


def _verdict(metric: str, gain: Interval) -> str:
    """What the comparison on held-out prompts says."""
    sign = measures.find(metric).sign
    if gain.low is None or gain.high is None:
        return f"Fewer than {MINIMUM} held-out prompts: nothing is said of a gain ({gain})."
    span = f"{metric} {gain.estimate:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    better, worse = (gain.low > 0, gain.high < 0) if sign > 0 else (gain.high < 0, gain.low > 0)
    if better:
        return f"Together they do more than the best single direction: {span}."
    if worse:
        return f"Together they do less than the best single direction: {span}."
    return f"The gain over the best single direction is within noise: {span}."


@dataclass
class _Work:
    """A search in progress."""

    model: SteeringModel
    line: str
    parts: Sequence[str]
    prompts: Sequence[Any]
    directions: Mapping[str, Vector]
    folder: Path
    metric: str
    limits: Mapping[str, float]
    fields: Mapping[str, Any]

    def study(self, lines: Sequence[str], prompts: Sequence[Any]) -> Study:
        return Study.sweep(lines, prompts, self.directions, **self.fields)

    def check(self, prove: Sequence[Any]) -> None:
        """Refuses what the studies would, before anything runs."""
        for prompts in (self.prompts, prove):
            self.study([self.line.replace("?", "0.1")], prompts)
        check_apart({"selection": self.prompts, "held out": prove})

    def at(self, values: Sequence[float]) -> str:
        """The line with values in place of its unknowns; what is next to nothing is left out."""
        left, kept = list(values), []
        for part in self.parts:
            value = left.pop(0) if "?" in part else None
            if value is None or value >= NOTHING:
                kept.append(part if value is None else part.replace("?", f"{value:.4g}"))
        return "; ".join(kept)

    def trials(self, optuna: Any, count: int, batch: int, most: float, seed: int) -> pd.DataFrame:
        """Every candidate with its effect on the selection prompts."""
        content = [self.line, [Item.of(one).id for one in self.prompts], batch, most, seed]
        told = [self.metric, dict(self.limits), {k: str(v) for k, v in self.fields.items()}]
        text = json.dumps([self.model.measured(), *content, *told], sort_keys=True)
        name = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]
        backend = optuna.storages.journal.JournalFileBackend(str(self.folder / "journal.log"))
        storage = optuna.storages.JournalStorage(backend)
        trying = optuna.create_study(
            storage=storage, study_name=name, direction="maximize", load_if_exists=True
        )
        unknowns = self.line.count("?")
        waiting = optuna.trial.TrialState.RUNNING

        def asked(trial: "optuna.Trial") -> list[float]:
            return [trial.suggest_float(f"x{n}", 0.0, most) for n in range(unknowns)]

        def sampler(number: int) -> Any:
            # a sampler for each candidate, so that it depends on those before it and nothing else
            return optuna.samplers.TPESampler(
                seed=seed * 1_000_003 + number, n_startup_trials=2 * batch, constant_liar=True
            )

        with progress("searching", count, unit="candidates") as report:
            while True:
                known = trying.get_trials(deepcopy=False)
                open_ones = [trial for trial in known if trial.state == waiting]
                begin = (open_ones[0].number if open_ones else len(known)) // batch * batch
                todo = []
                for one in open_ones:  # asked for, then the process was killed
                    trying.sampler = sampler(one.number)
                    again = optuna.Trial(trying, one._trial_id)
                    todo.append((again, asked(again)))
                # results are told after all of a batch was asked for
                told_some = open_ones and known[begin].state != waiting
                for number in range(len(known), 0 if told_some else min(count, begin + batch)):
                    trying.sampler = sampler(number)
                    fresh = trying.ask()
                    todo.append((fresh, asked(fresh)))
                if not todo:
                    break
                lines = [self.at(values) for _, values in todo]
                found = self.measured(lines)
                for (trial, _), text in zip(todo, lines, strict=True):
                    value, excess = found[text]
                    trial.set_user_attr("line", text)
                    for limit, beyond in zip(self.limits, excess, strict=True):
                        trial.set_constraint(limit, beyond)
                    trying.tell(trial, value)
                report(todo[-1][0].number + 1)
        rows = [
            {
                "number": trial.number,
                "line": trial.user_attrs["line"],
                **trial.params,
                "effect": trial.value,
                "passes": max(trial.constraints.values(), default=0.0) <= 0,
            }
            for trial in trying.get_trials(deepcopy=False)[:count]
        ]
        return pd.DataFrame(rows)

    def singles(self, doses: Sequence[float]) -> pd.DataFrame:
        """Each direction alone, at each dose."""
        lines = [
            part.replace("?", f"{dose:.4g}") for part in self.parts if "?" in part for dose in doses
        ]
        found = self.measured(lines)
        rows = [
            {"line": text, "effect": found[text][0], "passes": max(found[text][1], default=0) <= 0}
            for text in lines
        ]
        return pd.DataFrame(rows)

    def measured(self, lines: Sequence[str]) -> dict[str, tuple[float, list[float]]]:
        """Line -> (mean effect on the selection prompts, by how much each limit is passed)."""
        found: dict[str, tuple[float, list[float]]] = {"": (0.0, [0.0] * len(self.limits))}
        todo = [text for text in dict.fromkeys(lines) if text]
        if not todo:
            return found
        study = self.study(todo, self.prompts)
        table = study.run(self.model, self.folder / "selection").table()
        for text, mine in by_line(table, todo, self.fields["metrics"]).items():
            beyond = []
            for name, limit in self.limits.items():
                worse = measures.find(name).sign
                value = mine[name].mean()
                beyond.append(1.0 if math.isnan(value) else float(worse * (limit - value)))
            found[text] = effect(mine, self.metric), beyond
        return found

    def shown(self, best: str, single: str, prove: Sequence[Any]) -> tuple[pd.DataFrame, Interval]:
        """Best and single on held-out prompts, and their paired difference."""
        lines = list(dict.fromkeys((single, best)))
        table = self.study(lines, prove).run(self.model, self.folder / "held_out").table()
        names = list(self.fields["metrics"])
        found = by_line(table, lines, names)
        plain = {name: found[best][BEFORE.format(name)].mean() for name in names}
        rows = [{"arm": "unsteered", **plain}]
        for arm, text in (("single", single), ("together", best)):
            rows.append({"arm": arm, "line": text, **found[text][names].mean()})
        both = pd.concat([found[best][self.metric], found[single][self.metric]], axis=1).dropna()
        one, other = (both.iloc[:, n].to_numpy(float) for n in (0, 1))
        rate = measures.find(self.metric).kind == "rate"
        gain = intervals.difference(one, other, kind="rate" if rate else "mean")
        if len(both) < MINIMUM:
            gain = Interval(gain.estimate, None, None, len(both), "too few prompts", gain.level)
        return pd.DataFrame(rows), gain


def _best(table: pd.DataFrame, what: str) -> str:
    """The line with the largest effect within the limits, the first of equal ones."""
    there = table[table["passes"] & (table["line"] != "")]
    if there.empty:
        raise RunError(f"no {what} stays within the limits; allow more, or smaller strengths")
    return str(there["line"].iloc[int(there["effect"].to_numpy(float).argmax())])


def _optuna() -> Any:
    """Optuna, which is an extra."""
    with contextlib.suppress(ImportError):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return optuna
    raise RequestError("a search needs Optuna: pip install 'interp-steer[tune]'")
