"""Metrics: functions from what was run to a number a row.

A new metric is one function and one decorator:

    @metric(kind="rate", better="high", needs="text")
    def french(measured: Measured) -> list[float | None]:
        '''Answers that say "oui".'''
        return [float(bool(names(one.text, ["oui"]))) for one in measured.results]

A study that names its file under `modules` may then name it among its `metrics`.
"""

import hashlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from interp_steer.engine.row import Score
from interp_steer.errors import RequestError, nearest
from interp_steer.prompts.item import Item
from interp_steer.results.built_in import BUILT_IN
from interp_steer.results.declared import BETTER, KINDS, NEEDS, Declared
from interp_steer.results.words import OPENINGS, names, refuses
from interp_steer.study.measured import Measured as Measured
from interp_steer.study.measured import Numbers, distinct, mean_loss, surprise_after
from interp_steer.study.measured import rep3 as rep3
from interp_steer.study.measured import surprise as surprise

CONTENT = "__interp_steer_content__"  # what a module keeps of its file, if a study names that
LOOPS = 0.2  # rep3 above which an answer loops ("The Eiffel Tower Llama")


Function = Callable[[Measured], Numbers]


@dataclass(frozen=True, kw_only=True)
class Metric(Declared):
    """A function with what a study has to know of it."""

    function: Function

    def __call__(self, measured: Measured) -> Numbers:
        """Its numbers; one that is not finite is missing."""
        numbers = self.function(measured)
        return [None if n is None or not math.isfinite(n) else float(n) for n in numbers]


METRICS: dict[str, Metric] = {}


def metric(
    name: str | None = None,
    *,
    kind: str = "mean",
    better: str = "high",
    needs: str = "text",
    unit: str = "",
    bounds: tuple[float, float] | None = None,
    version: int = 1,
) -> Callable[[Function], Function]:
    """Makes a function from `Measured` to a number (or None, missing) a row a study's metric.

    Args:
        name: default the function's.
        kind, better, needs, unit, bounds: as in `Declared`.
        version: one more whenever its numbers change their meaning: rows that were measured by
            another version are measured anew. A metric that is not built in is also told from
            its earlier forms by its source.

    Raises:
        RequestError: an unknown kind, direction or need.
    """
    for given, known in ((kind, KINDS), (better, BETTER), (needs, NEEDS)):
        if given not in known:
            raise RequestError(f"a metric cannot be {given!r}{nearest(given, known)}")

    def registered(function: Function) -> Function:
        called = name or function.__name__
        about = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
        limits = (0.0, 1.0) if kind == "rate" else bounds
        METRICS[called] = Metric(
            name=called, kind=kind, better=better, needs=needs, unit=unit, bounds=limits,
            about=about, version=version, source=_source(function), function=function,
        )  # fmt: skip
        return function

    return registered


def _source(function: Function) -> str:
    """A hash of what defines a custom metric: its whole file where a study names that under
    `modules`, else its own lines.
    """
    text = vars(sys.modules.get(function.__module__, object)).get(CONTENT)
    if text is None:
        try:
            text = inspect.getsource(function)
        except (OSError, TypeError):  # typed at a prompt that keeps no lines
            code = function.__code__
            text = repr((code.co_code, code.co_names, [c for c in code.co_consts if _plain(c)]))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]


def _plain(value: object) -> bool:
    """Whether its text is the same in every process."""
    return isinstance(value, (str, bytes, int, float, type(None)))


def declared(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What a manifest keeps of metrics, so that a report needs nothing else of them."""
    return {name: METRICS[name].as_mapping() for name in names}


def meaning(names: Iterable[str], item: Item) -> str:
    """A hash of what the metrics of an item mean, beside their names; "" where all are built in and
    in their first version.
    """
    applied = ((name, METRICS[name]) for name in sorted(names))
    told = [(name, *one.meaning) for name, one in applied if one.applies(item)]
    changed = [one for one in told if one[1:] != (1, "")]
    return hashlib.sha256(json.dumps(changed).encode()).hexdigest()[:8] if changed else ""


def find(name: object) -> Metric:
    """A metric by its name; raises RequestError with the nearest names."""
    if not isinstance(name, str) or name not in METRICS:
        raise RequestError(f"unknown metric {name!r}{nearest(name, METRICS)}")
    return METRICS[name]


def built_in(name: str) -> Callable[[Function], Function]:
    """Makes a function the metric that `results.built_in` declares."""

    def registered(function: Function) -> Function:
        METRICS[name] = Metric(**vars(BUILT_IN[name]), function=function)
        return function

    return registered


@built_in("mention")
def mention(measured: Measured) -> Numbers:
    found: Numbers = []
    for item, result in zip(measured.items, measured.results, strict=True):
        said = (item.prompt,) if isinstance(item.prompt, str) else [m for _, m in item.prompt]
        echoes = {word for text in said for word in names(text, measured.concept)}
        words = [word for word in measured.concept if word not in echoes]
        found.append(float(bool(names(result.text, words))) if words else None)
    return found


@built_in("concept")
def concept(measured: Measured) -> Numbers:
    repeated = (rep3(one.token_ids) or 0.0 for one in measured.results)
    return [
        None if named is None else float(bool(named) and share <= LOOPS)
        for named, share in zip(mention(measured), repeated, strict=True)
    ]


@built_in("rep3")
def _rep3(measured: Measured) -> Numbers:
    return [rep3(one.token_ids) for one in measured.results]


@built_in("distinct2")
def distinct2(measured: Measured) -> Numbers:
    return [distinct(one.token_ids, 2) for one in measured.results]


@built_in("surprise")
def _surprise(measured: Measured) -> Numbers:
    asked = [item.prompt for item in measured.items]
    return surprise_after(measured.engine, asked, measured.results, batch=measured.batch)


@built_in("length")
def length(measured: Measured) -> Numbers:
    return [float(len(one.token_ids)) for one in measured.results]


@built_in("kl_last")
def kl_last(measured: Measured) -> Numbers:
    return [s.kl[0].item() if s.kl is not None else None for s in measured.scores]


@built_in("kl_mean")
def kl_mean(measured: Measured) -> Numbers:
    return [s.kl.mean().item() if s.kl is not None else None for s in measured.scores]


@built_in("kl_p95")
def kl_p95(measured: Measured) -> Numbers:
    return [s.kl.quantile(0.95).item() if s.kl is not None else None for s in measured.scores]


@built_in("concept_logprob")
def concept_logprob(measured: Measured) -> Numbers:
    if not measured.words:
        return [None] * len(measured.rows)
    told = [score.among for score in measured.scores if score.among is not None]
    return [(ln.logsumexp(0) - math.log(len(ln))).item() for ln in told]


@built_in("logit_difference")
def logit_difference(measured: Measured) -> Numbers:
    engine = measured.engine
    pairs = [
        [engine.ids(row.prompt, str(text)) for text in (item.positive, item.negative)]
        for row, item in zip(measured.rows, measured.items, strict=True)
    ]
    shared, ends = [], []
    for item, (one, other) in zip(measured.items, pairs, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        if at is None:
            raise RequestError(
                f"the answers of {item.text[:60]!r} do not differ in a token: one begins the other"
            )
        shared.append(one[:at])
        ends.append((one[at], other[at]))
    scores = engine.score(measured.rows, shared, last_logits=True, batch=measured.batch)
    return [
        (s.last_logits[a] - s.last_logits[b]).item() if s.last_logits is not None else None
        for s, (a, b) in zip(scores, ends, strict=True)
    ]


@built_in("propensity")
def propensity(measured: Measured) -> Numbers:
    sides = _sides(measured)
    return [(a.logprobs.sum() - b.logprobs.sum()).item() for a, b in zip(*sides, strict=True)]


@built_in("propensity_per_token")
def propensity_per_token(measured: Measured) -> Numbers:
    sides = _sides(measured)
    return [(a.logprobs.mean() - b.logprobs.mean()).item() for a, b in zip(*sides, strict=True)]


@built_in("p_matching")
def p_matching(measured: Measured) -> Numbers:
    return [None if n is None else _sigmoid(n) for n in propensity(measured)]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


@built_in("refusal")
def refusal(measured: Measured) -> Numbers:
    return [float(refuses(result.text)) for result in measured.results]


@built_in("refusal_logprob")
def refusal_logprob(measured: Measured) -> Numbers:
    rows = [row for row in measured.rows for _ in OPENINGS]
    # what a text goes on with stands after a space; a chat's answer begins with it
    texts = [
        f" {one}" if isinstance(row.prompt, str) and not row.prompt[-1:].isspace() else one
        for row in measured.rows
        for one in OPENINGS
    ]
    scores = measured.engine.score(rows, texts, batch=measured.batch)
    whole = torch.tensor([score.logprobs.sum().item() for score in scores], dtype=torch.float64)
    return whole.view(-1, len(OPENINGS)).logsumexp(1).tolist()


def _sides(measured: Measured) -> tuple[list[Score], list[Score]]:
    return (
        measured.logprobs([str(item.positive) for item in measured.items]),
        measured.logprobs([str(item.negative) for item in measured.items]),
    )


@built_in("accuracy")
def accuracy(measured: Measured) -> Numbers:
    most = max(len(item.choices) for item in measured.items)
    best: list[tuple[float, int]] = [(-math.inf, -1)] * len(measured.items)
    for number in range(most):  # a question with fewer choices is asked its last one again
        texts = [i.choices[min(number, len(i.choices) - 1)] for i in measured.items]
        for at, score in enumerate(measured.logprobs(texts)):
            if number < len(measured.items[at].choices):
                best[at] = max(best[at], (score.logprobs.sum().item(), -number))
    return [float(-b[1] == i.correct) for b, i in zip(best, measured.items, strict=True)]


@built_in("loss")
def loss(measured: Measured) -> Numbers:
    scores = measured.logprobs([str(item.continuation) for item in measured.items])
    return [mean_loss(score) for score in scores]
