"""Strengths of equal damage: for every line the dose at which it moves the model by one KL.

    tuned = equal_kl(model, "add(joy, ? dose) at {8-20/2}", prompts, {"joy": joy}, "TUNED")
    tuned.lines        # ready for `generate`, `Study(lines=...)`

Equal doses are not equal damage: layers, operators and directions differ in what a dose does. So
they are compared where KL(unsteered || steered), on the unsteered model's own greedy answers, is
the same. Every candidate's doses are one batch of teacher-forced rows, and so is every later round.
The rows are a study's, in a folder: what was run is never run again, and Ray runs them as well.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row, Sampling
from interp_steer.errors import RequestError
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.parts import check_apart
from interp_steer.results.roles import declared_in
from interp_steer.stats import intervals
from interp_steer.stats.interval import MINIMUM
from interp_steer.steering.grammar import parse
from interp_steer.steering.intervention import Intervention, Vector, resolve
from interp_steer.steering.intervention import line as text_of
from interp_steer.steering.spread import spread
from interp_steer.study.study import Study
from interp_steer.tune.curve import DOSES, Curve

METRICS = ("kl_mean", "kl_p95")
TARGET = 0.2  # nats a token
LENGTH = 64  # tokens of an answer on which KL is measured
BATCHES = 4
UNITS = {"dose": 1.0, "deg": 100.0}  # what stands for a dose of 1
ZERO = ("add", "add_norm_kept", "rotate")  # operators that do nothing at 0
FLOOR = 10.0  # a target is at least so many times the KL that rounding makes
Values = Float[np.ndarray, " prompt"]
_PLACE = re.compile(r"\?\s*([a-z]*)")


@dataclass(frozen=True, eq=False)
class Tuned:
    """What `equal_kl` found.

    Attributes:
        table: a row for each line: `line`, `outcome` (see `curve.OUTCOMES`), `strength` with its
            `unit`, `steer` (the line with lengths), `kl` and `kl_p95` in nats a token on the
            selection prompts, `batches`, `monotone` (False: the target is crossed more than once,
            and the lowest dose is taken); on held-out prompts `held_out` with `low`, `high`, `n`.
        curves: every dose that was tried: `line`, `strength`, `kl`, `kl_p95`.
        target: nats a token.
        batches: how many were run.
    """

    table: pd.DataFrame
    curves: pd.DataFrame
    target: float
    batches: int

    @property
    def lines(self) -> list[str]:
        """Lines at their strengths, in lengths; of those that meet the target."""
        return list(self.table.loc[self.table["outcome"] == "ok", "steer"])

    def _repr_html_(self) -> str:
        from interp_steer.util.html import frame

        return frame(self.table.drop(columns="steer"), f"{self.target:g} nats a token")


@dataclass(frozen=True)
class Trial:
    """What is asked, read: lines with `?`, what the names mean, and the target.

    Attributes:
        lines: with `?`, every one that braces stand for.
        units: of each line's unknown strength.
        fields: further ones of the studies that measure.
    """

    lines: tuple[str, ...]
    units: tuple[str, ...]
    directions: Mapping[str, Vector]
    target: float
    fields: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        lines: str | Sequence[str],
        directions: Mapping[str, Vector],
        target: float = TARGET,
        **fields: Any,
    ) -> "Trial":
        """Raises RequestError as `equal_kl` does."""
        if not 0 < target < 100:
            raise RequestError(
                f"a target of {target:g} nats a token; expected above 0, such as 0.2"
            )
        given = (lines,) if isinstance(lines, str) else lines
        read = tuple(dict.fromkeys(one for text in given for one in spread(text).lines))
        units = tuple(map(_unit, read))
        return cls(read, units, directions, target, {"metrics": METRICS, **fields})

    @property
    def examples(self) -> list[tuple[Intervention, ...]]:
        """Every line at some strength."""
        return [parse(_at(one, 1.0), self.directions) for one in self.lines]

    def study(self, texts: Sequence[str], prompts: Sequence[Any]) -> Study:
        """What measures lines on prompts."""
        return Study.sweep(texts, prompts, self.directions, **self.fields)

    def check(self, prompts: Sequence[Any], held_out: Sequence[Any]) -> None:
        """Raises RequestError where the studies would, and for a prompt that both parts have."""
        example = [_at(one, 1.0) for one in self.lines]
        self.study(example, prompts)
        if held_out:
            self.study(example, held_out)
            check_apart({"selection": prompts, "held out": held_out})


def equal_kl(
    model: SteeringModel,
    lines: str | Sequence[str],
    prompts: Sequence[Any],
    directions: Mapping[str, Vector],
    folder: str | Path,
    *,
    target: float = TARGET,
    held_out: Sequence[Any] = (),
    length: int = LENGTH,
    doses: Sequence[float] = DOSES,
    batches: int = BATCHES,
    **fields: Any,
) -> Tuned:
    """Finds every line's dose for one KL.

    Args:
        lines: of interventions with `?` for the strength, `? dose` or `? deg`; braces stand for
            many (see `spread`).
        prompts: that find the dose (selection).
        directions: what the names mean.
        folder: of the rows; what is there is not run again.
        target: mean over prompts of the mean KL a token, in nats.
        held_out: other prompts, on which the KL at the dose found is measured.
        length: tokens of the unsteered answer that are read.
        doses: that are tried first.
        batches: at most so many rounds, the first one included.
        fields: further ones of a study: `system`, `as_chat`, `chunk`.

    Raises:
        RequestError: a line without `?`, with another unit or that cannot be read; a target of 0
            or less, or below ten times what rounding makes; or as `Study` does.
        RunError: as a study's run does.
    """
    if not doses or min(doses) <= 0 or len(set(doses)) < len(doses):
        shown = ", ".join(map(str, doses))
        raise RequestError(f"doses are {shown}; expected some above 0, each once")
    if type(batches) is not int or batches < 1:
        raise RequestError(f"batches is {batches!r}, expected at least 1")
    sampling = Sampling(max_new_tokens=length)
    trial = Trial.of(lines, directions, target, sampling=sampling, **fields)
    trial.check(prompts, held_out)
    templates, units = trial.lines, trial.units
    curves = [Curve(target, all(s.operator in ZERO for s in one)) for one in trial.examples]
    _check_floor(trial, model, prompts)
    folder = Path(folder)
    tried: list[tuple[str, float, float, float]] = []
    rounds = [0] * len(templates)
    todo = [(n, float(dose)) for n in range(len(templates)) for dose in doses]
    done = 0
    while todo and done < batches:
        strengths = [dose * UNITS[units[n]] for n, dose in todo]
        texts = [_at(templates[n], x) for (n, _), x in zip(todo, strengths, strict=True)]
        found: dict[int, dict[float, float]] = {}
        values = _measured(trial.study(texts, prompts), model, folder / "selection")
        for (n, dose), strength, (kl, high) in zip(todo, strengths, values, strict=True):
            found.setdefault(n, {})[dose] = float(kl.mean())
            tried.append((templates[n], strength, float(kl.mean()), high))
        done += 1
        for n, points in found.items():
            curves[n].add(points)
            rounds[n] = done
        following = [(n, curve.next) for n, curve in enumerate(curves)]
        todo = [(n, dose) for n, dose in following if dose is not None]
    known = pd.DataFrame(tried, columns=["line", "strength", "kl", "kl_p95"])
    scale = trial.study([_at(templates[0], 1.0)], prompts).bound(model).scale(model)
    rows = []
    for n, (one, curve) in enumerate(zip(templates, curves, strict=True)):
        row: dict[str, Any] = {
            "line": one, "outcome": curve.outcome, "strength": None, "unit": units[n],
            "steer": None, "kl": None, "kl_p95": None, "batches": rounds[n],
            "monotone": curve.monotone,
        }  # fmt: skip
        if curve.best is not None:
            strength = curve.best * UNITS[units[n]]
            steps = resolve(parse(_at(one, strength), directions), scale)
            here = known[(known["line"] == one) & (known["strength"] == strength)].iloc[0]
            row |= {"strength": strength, "steer": text_of(steps)}
            row |= {"kl": here["kl"], "kl_p95": here["kl_p95"]}
        rows.append(row)
    table = pd.DataFrame(rows)
    if held_out:
        table = _shown(table, trial, model, held_out, folder / "held_out")
    in_order = known.sort_values(["line", "strength"], kind="stable", ignore_index=True)
    return Tuned(table, in_order, target, done)


def _measured(study: Study, model: SteeringModel, folder: Path) -> list[tuple[Values, float]]:
    """Of each of the study's lines the KL of every prompt, and the mean of its 95th percentiles."""
    run = study.run(model, folder)
    rows: dict[str, dict[str, list[Mapping[str, float]]]] = {}
    for planned in run.plan:
        if planned["role"] in ("grid", "chosen"):
            items = rows.setdefault(declared_in(planned)[0], {})
            items.setdefault(planned["item"], []).append(run.rows[planned["key"]]["metrics"])
    found = []
    for text, *_ in study.settings:
        mean, high = (
            np.array([np.mean([one[name] for one in some]) for some in rows[text].values()])
            for name in METRICS
        )
        found.append((mean, float(high.mean())))
    return found


def _shown(
    table: pd.DataFrame, trial: Trial, model: SteeringModel, held_out: Sequence[Any], folder: Path
) -> pd.DataFrame:
    """The table with the KL of the doses found on prompts that did not find them."""
    there = table.index[table["steer"].notna()]
    names = ("held_out", "low", "high", "n")
    table = table.assign(**{name: math.nan for name in names})
    if len(there):
        study = trial.study(list(table.loc[there, "steer"]), held_out)
        for n, (kl, _) in zip(there, _measured(study, model, folder), strict=True):
            span = intervals.mean(kl, bounds=(0.0, math.inf))
            ends = (span.low, span.high) if len(kl) >= MINIMUM else (None, None)
            table.loc[n, list(names)] = [float(kl.mean()), *ends, len(kl)]
    return table


def _check_floor(trial: Trial, model: SteeringModel, prompts: Sequence[Any]) -> None:
    """Refuses a target that rounding alone comes near: KL of the model from itself, in two
    batches. Float32 rounds away about 1e-6 nats, bfloat16 1e-2 and more.
    """
    if model.dtype == torch.float32:
        return
    items = trial.study([_at(trial.lines[0], 1.0)], prompts[:8]).bound(model).prove
    engine, rows = Engine(model), [Row(item.prompt) for item in items]
    sampling = Sampling(max_new_tokens=16)
    said = engine.generate([Row(item.prompt, (), sampling) for item in items])
    after = [result.token_ids for result in said]
    together = engine.score(rows, after, last_logits=True)
    apart = []
    for row, ids, one in zip(rows, after, together, strict=True):
        (other,) = engine.score([row], [ids], last_logits=True)
        assert one.last_logits is not None and other.last_logits is not None
        p, q = one.last_logits.log_softmax(-1), other.last_logits.log_softmax(-1)
        apart.append((p.exp() * (p - q)).sum().item())
    floor = FLOOR * max(0.0, sum(apart) / len(apart))
    if trial.target < floor:
        raise RequestError(
            f"a target of {trial.target:g} nats is below {floor:.2g}, {FLOOR:g} times what "
            f"{model.dtype} rounds away between two batches; load the model in float32, or raise "
            "the target"
        )


def _unit(text: str) -> str:
    """The unit of a line's unknown strength."""
    found = {match[1] for match in _PLACE.finditer(text)}
    if not found:
        raise RequestError(
            f"{text!r} has no strength to be found; write ? in its place, as in "
            "add(joy, ? dose) at 12"
        )
    if len(found) > 1 or not found <= set(UNITS):
        shown = ", ".join(sorted(f"? {unit}".strip() for unit in found))
        raise RequestError(f"{text!r} has {shown}; expected one unknown, '? dose' or '? deg'")
    return found.pop()


def _at(text: str, strength: float) -> str:
    """A line with a strength in place of `?`."""
    return text.replace("?", f"{strength:.6g}")
