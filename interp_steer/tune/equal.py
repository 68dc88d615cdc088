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
from interp_steer.results.roles import declared_in
from interp_steer.stats import intervals
from interp_steer.stats.interval import MINIMUM
from interp_steer.steering.grammar import parse
from interp_steer.steering.intervention import Vector, resolve
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
    if not 0 < target < 100:
        raise RequestError(f"a target of {target:g} nats a token; expected above 0, such as 0.2")
    if not doses or min(doses) <= 0 or len(set(doses)) < len(doses):
        raise RequestError(
            f"doses are {', '.join(map(str, doses))}; expected some above 0, each once"
        )
    if type(batches) is not int or batches < 1:
        raise RequestError(f"batches is {batches!r}, expected at least 1")
    given = (lines,) if isinstance(lines, str) else lines
    templates = list(dict.fromkeys(one for text in given for one in spread(text).lines))
    units = [_unit(one) for one in templates]
    curves = [Curve(target, _is_identity(one, directions)) for one in templates]
    sampling = Sampling(max_new_tokens=length)
    ground = _Ground(model, directions, {"metrics": METRICS, "sampling": sampling, **fields})
    ground.check_floor(prompts, target)
    folder = Path(folder)
    tried: list[tuple[str, float, float, float]] = []
    rounds = [0] * len(templates)
    todo = [(n, float(dose)) for n in range(len(templates)) for dose in doses]
    done = 0
    while todo and done < batches:
        strengths = [dose * UNITS[units[n]] for n, dose in todo]
        texts = [_at(templates[n], x) for (n, _), x in zip(todo, strengths, strict=True)]
        found: dict[int, dict[float, float]] = {}
        values = ground.measured(texts, prompts, folder / "selection")
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
    scale = ground.study([_at(templates[0], 1.0)], prompts).bound(model).scale(model)
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
        table = ground.shown(table, held_out, folder / "held_out")
    in_order = known.sort_values(["line", "strength"], kind="stable", ignore_index=True)
    return Tuned(table, in_order, target, done)


@dataclass(frozen=True)
class _Ground:
    """What all rounds share: the model, the directions, and the fields of their studies."""

    model: SteeringModel
    directions: Mapping[str, Vector]
    fields: Mapping[str, Any]

    def study(self, texts: Sequence[str], prompts: Sequence[Any]) -> Study:
        return Study.sweep(texts, prompts, self.directions, **self.fields)

    def measured(
        self, texts: Sequence[str], prompts: Sequence[Any], folder: Path
    ) -> list[tuple[Values, float]]:
        """Of each line the KL of every prompt, and the mean of its 95th percentiles."""
        study = self.study(texts, prompts)
        run = study.run(self.model, folder)
        rows: dict[str, dict[str, list[Mapping[str, float]]]] = {}
        for planned in run.plan:
            if planned["role"] in ("grid", "chosen"):
                items = rows.setdefault(declared_in(planned)[0], {})
                metrics = run.rows[planned["key"]]["metrics"]
                items.setdefault(planned["item"], []).append(metrics)
        found = []
        for text, *_ in study.settings:
            mean, high = (
                np.array([np.mean([one[name] for one in some]) for some in rows[text].values()])
                for name in METRICS
            )
            found.append((mean, float(high.mean())))
        return found

    def shown(self, table: pd.DataFrame, held_out: Sequence[Any], folder: Path) -> pd.DataFrame:
        """The table with the KL of the doses found on prompts that did not find them."""
        there = table.index[table["steer"].notna()]
        names = ("held_out", "low", "high", "n")
        table = table.assign(**{name: math.nan for name in names})
        if len(there):
            values = self.measured(list(table.loc[there, "steer"]), held_out, folder)
            for n, (kl, _) in zip(there, values, strict=True):
                span = intervals.mean(kl, bounds=(0.0, math.inf))
                ends = (span.low, span.high) if len(kl) >= MINIMUM else (None, None)
                table.loc[n, list(names)] = [float(kl.mean()), *ends, len(kl)]
        return table

    def check_floor(self, prompts: Sequence[Any], target: float) -> None:
        """Refuses a target that rounding alone comes near: KL of the model from itself, in two
        batches. Float32 rounds away about 1e-6 nats, bfloat16 1e-2 and more.
        """
        if self.model.dtype == torch.float32:
            return
        some = next(iter(self.directions))
        items = self.study([f"ablate({some}) at 0"], prompts[:8]).bound(self.model).prove
        engine, rows = Engine(self.model), [Row(item.prompt) for item in items]
        said = engine.generate(
            [Row(item.prompt, (), Sampling(max_new_tokens=16)) for item in items]
        )
        after = [result.token_ids for result in said]
        together = engine.score(rows, after, last_logits=True)
        apart = []
        for row, ids, one in zip(rows, after, together, strict=True):
            (other,) = engine.score([row], [ids], last_logits=True)
            assert one.last_logits is not None and other.last_logits is not None
            p, q = one.last_logits.log_softmax(-1), other.last_logits.log_softmax(-1)
            apart.append((p.exp() * (p - q)).sum().item())
        floor = FLOOR * max(0.0, sum(apart) / len(apart))
        if target < floor:
            raise RequestError(
                f"a target of {target:g} nats is below {floor:.2g}, {FLOOR:g} times what "
                f"{self.model.dtype} rounds away between two batches; load the model in float32, "
                "or raise the target"
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


def _is_identity(text: str, directions: Mapping[str, Vector]) -> bool:
    """Whether the line does nothing at strength 0."""
    return all(step.operator in ZERO for step in parse(_at(text, 1.0), directions))
