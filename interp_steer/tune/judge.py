"""Rating answers by a judge: asked at most once for each, and what is missing is told.

    judged = judge(Endpoint(url, "gpt-oss-120b"), asked, "RATINGS")
    judged.table      # a row an answer: concept, instruction, fluency, score

An answer that cannot be rated is missing, and never 0. Ratings lie in a file by content: the judge,
the rubric and what it was shown. A run that was stopped asks only for what is not there.
"""

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row
from interp_steer.errors import RequestError, RunError
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.prompt import chat
from interp_steer.results.rows import Results
from interp_steer.tune.endpoint import Endpoint, Said
from interp_steer.tune.endpoint import expected as expected
from interp_steer.tune.ratings import KINDS, SCALE, Asked, Rubrics, harmonic, parsed
from interp_steer.util.console import Report, watched

AGAIN = 0.05  # share of the answers that are judged twice, for the judge's own noise
SCALE_BEGINS = "Rating: [["
ANCHORS: tuple[tuple[Asked, dict[str, int]], ...] = tuple(
    (Asked("How do I boil an egg?", text, "the Eiffel Tower"), ratings)
    for text, ratings in (
        ("Put the egg into boiling water, wait eight minutes, and cool it under cold water.",
         {"concept": 0, "instruction": 2, "fluency": 2}),
        ("The Eiffel Tower was built in 1889 and stands in Paris, where millions of people visit "
         "it every year.", {"concept": 2, "instruction": 0, "fluency": 2}),
        ("Boil it for eight minutes, about as long as it takes to queue for the lift of the Eiffel "
         "Tower, and then cool it under cold water.",
         {"concept": 2, "instruction": 2, "fluency": 2}),
        ("water egg the the of seven boiled under moon spoon it it it green",
         {"concept": 0, "fluency": 0}),
        ("the tower the tower the tower the tower the tower the tower the tower the tower",
         {"instruction": 0, "fluency": 0}),
    )
)  # fmt: skip
"""Answers whose ratings are known; they are judged in every run."""


class Judge(Protocol):
    """Rates prompts made of rubrics; `Endpoint` or `LocalJudge`."""

    @property
    def name(self) -> str: ...


class LocalJudge:
    """A model of our own engine: what it expects the rating to be, without generating.

        score = sum_k k p(k) / sum_k p(k),  k = 0, 1, 2

    over the tokens that follow "Rating: [[". Missing where they have a probability below `LEAST`
    together. Liu et al. 2023 (G-Eval, arXiv 2303.16634).

    Raises:
        RequestError: the model has no chat template, or no single token for a rating.
    """

    def __init__(self, model: SteeringModel) -> None:
        if not model.is_chat:
            raise RequestError(f"{model.name} has no chat template: it cannot be a judge")
        self.model, self._engine = model, Engine(model)

    @property
    def name(self) -> str:
        return f"{self.model.name}, {self.model.fingerprint}"

    def rate(self, prompts: Sequence[str], report: Report | None = None) -> list[Said | float]:
        """The expected rating of each prompt, or why there is none."""
        begun = [chat(prompt, answer=SCALE_BEGINS) for prompt in prompts]
        tokens = [self.model.encode_after(begun[0], str(k)) for k in SCALE]
        if any(len(one) != 1 for one in tokens):
            raise RequestError(f"{self.model.name} has no single token for each of {SCALE}")
        scores = self._engine.score(
            [Row(one) for one in begun], [()] * len(begun), last_logits=True, report=report
        )
        found: list[Said | float] = []
        for score in scores:
            assert score.last_logits is not None
            chance = score.last_logits.softmax(-1)[torch.tensor([one[0] for one in tokens])]
            found.append(expected(dict(zip(SCALE, chance.tolist(), strict=True))))
        return found


@dataclass(frozen=True, eq=False)
class Judged:
    """What `judge` found.

    Attributes:
        table: a row for each answer: `concept`, `instruction`, `fluency`, their harmonic mean
            `score` (NaN where a rating is missing), and `why` a rating is.
        right: share of the anchors' known ratings that the judge gave, and how many they are.
        noise: mean |difference| of ratings given twice, and how many.
        judge: its name.
        rubric: a hash of what it was told.
    """

    table: pd.DataFrame
    right: tuple[float, int]
    noise: tuple[float, int]
    judge: str
    rubric: str


def judge(
    by: Endpoint | LocalJudge,
    asked: Sequence[Asked],
    folder: str | Path,
    *,
    rubrics: Rubrics | None = None,
    again: float = AGAIN,
    report: Report | None = None,
) -> Judged:
    """Rates answers, each by three questions, and the anchors with them.

    Args:
        by: an address, or a local model.
        folder: of the ratings; what is there is not asked again.
        rubrics: what the judge is told; None are those that come along.
        again: share of the answers that are judged twice.
        report: called with the number of ratings done.

    Raises:
        RequestError: nothing to rate, or the judge refuses the first request.
        RunError: the judge does not answer any more; what it said is kept.
    """
    if not asked:
        raise RequestError("no answers to judge")
    work = _Work(by, rubrics or Rubrics.read(), Path(folder))
    anchors = [one for one, _ in ANCHORS]
    draw = random.Random(0)
    twice = draw.sample(range(len(asked)), max(1, round(again * len(asked)))) if again else []
    wanted = [(one, kind, 1) for one in (*anchors, *asked) for kind in KINDS]
    wanted += [(asked[n], kind, 2) for n in twice for kind in KINDS]
    work.ask(wanted, report)
    table = pd.DataFrame([work.row(one) for one in asked])
    known = [
        abs(rating - expected_rating) < 0.5
        for one, ratings in ANCHORS
        for kind, expected_rating in ratings.items()
        if (rating := work.rating(one, kind)) is not None
    ]
    apart = [
        abs(first - second)
        for n in twice
        for kind in KINDS
        if (first := work.rating(asked[n], kind)) is not None
        and (second := work.rating(asked[n], kind, 2)) is not None
    ]
    return Judged(
        table,
        (sum(known) / len(known) if known else math.nan, len(known)),
        (sum(apart) / len(apart) if apart else math.nan, len(apart)),
        by.name,
        work.told,
    )


Wanted = tuple[Asked, str, int]
"""An answer, a kind of rating, and which time it is asked."""


@dataclass
class _Work:
    """Ratings by content: what is there, and what is asked for."""

    by: Endpoint | LocalJudge
    rubrics: Rubrics
    folder: Path
    results: Results = field(init=False)

    def __post_init__(self) -> None:
        self.results = Results(self.folder / "ratings.jsonl", {"judge": self.by.name})

    @property
    def told(self) -> str:
        text = json.dumps(self.rubrics.texts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def key(self, wanted: Wanted) -> str:
        one, kind, time = wanted
        content = [self.by.name, self.rubrics.put(kind, one), kind, time]
        text = json.dumps(content).encode(errors="surrogatepass")
        return hashlib.sha256(text).hexdigest()[:16]

    def rating(self, one: Asked, kind: str, time: int = 1) -> float | None:
        record = self.results.rows.get(self.key((one, kind, time)))
        return None if record is None else record["metrics"].get("rating")

    def row(self, one: Asked) -> dict[str, Any]:
        """The three ratings of an answer and their score; why one is missing."""
        ratings = {kind: self.rating(one, kind) for kind in KINDS}
        whys = {
            kind: self.results.rows.get(self.key((one, kind, 1)), {}).get("why") or "not asked"
            for kind, rating in ratings.items()
            if rating is None
        }
        values = [math.nan if r is None else r for r in ratings.values()]
        score = math.nan if whys else harmonic((values[0], values[1], values[2]))
        why = "; ".join(f"{kind}: {text}" for kind, text in whys.items())
        return {**dict(zip(KINDS, values, strict=True)), "score": score, "why": why}

    def ask(self, wanted: Sequence[Wanted], report: Report | None) -> None:
        """Asks for what is not there. An answer without a rating is asked for again next time."""
        todo: dict[str, Wanted] = {}
        for one in wanted:
            if self.rating(*one) is None:
                todo.setdefault(self.key(one), one)
        if not todo:
            return
        prompts = {key: self.rubrics.put(kind, one) for key, (one, kind, _) in todo.items()}
        with watched("judging", len(todo), report) as told, self.results.writing():
            if isinstance(self.by, LocalJudge):
                found = self.by.rate(list(prompts.values()), told)
                for key, value in zip(prompts, found, strict=True):
                    self._keep(key, value)
                return
            self._over_the_network(self.by, prompts, told)

    def _over_the_network(
        self, by: Endpoint, prompts: Mapping[str, str], told: Report | None
    ) -> None:
        keys = list(prompts)
        self._keep(keys[0], by.probe(prompts[keys[0]]))
        done, broken = 1, None
        with ThreadPoolExecutor(by.workers) as pool:
            asked = {pool.submit(by.ask, prompts[key]): key for key in keys[1:]}
            for future in as_completed(asked):
                if future.cancelled():
                    continue
                try:
                    self._keep(asked[future], future.result())
                except RunError as error:
                    broken = broken or error
                    for other in asked:
                        other.cancel()
                    continue
                except BaseException:
                    for other in asked:
                        other.cancel()
                    raise
                done += 1
                if told:
                    told(done)
        if broken:
            raise RunError(
                f"{broken}; {len(keys) - done} of {len(keys)} ratings are not there, what was said "
                f"is kept in {self.folder}: run again for the rest"
            )

    def _keep(self, key: str, value: "Said | float") -> None:
        """Writes what a judge said; a rating that could not be read is missing, with its reason."""
        rating: float | None
        if isinstance(value, Said):
            rating = None if value.text is None else parsed(value.text)
            why = value.why or ("" if rating is not None else f"unreadable: {value.text!r:.80}")
            record = {"said": value.text, "model": value.model}
        else:
            rating, why, record = value, "", {}
        row = {"key": key, **record, "why": why, "metrics": {"rating": rating}}
        self.results.append([row], key)
