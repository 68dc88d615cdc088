"""A chunk: rows that are run together, and the mapper that runs chunks.

A mapper takes chunks and gives each back with its records, or with the error. `Local` runs them in
this process; `on_ray` runs them on other machines. Nothing here knows what a study asks.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from interp_steer.engine.bank import Steering
from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row
from interp_steer.errors import RunError
from interp_steer.prompts.item import Item
from interp_steer.study import metrics as measures
from interp_steer.study.metrics import Measured
from interp_steer.util.console import Report

Record = dict[str, Any]
Outcome = list[Record] | Exception
"""A record for each row of a chunk, or why it has none."""


@dataclass(frozen=True)
class Chunk:
    """Rows of one kind of item, in the plan's order.

    Attributes:
        keys: a hash of each row's content.
        rows, items: what is run.
        about: further fields of each row's record.
        unsteered: token ids of the unsteered answers, for metrics that need them; None of a row
            whose unsteered answer is not known.
        metrics: names.
        concept: words of the concept.
        meanings: (version, source) of each metric where the chunk was made; `measure` refuses other
            ones. Empty: not compared.
        whole: False of a part of a chunk that failed.
    """

    keys: tuple[str, ...]
    rows: tuple[Row, ...]
    items: tuple[Item, ...]
    about: tuple[Mapping[str, Any], ...]
    unsteered: tuple[tuple[int, ...] | None, ...]
    metrics: tuple[str, ...]
    concept: tuple[str, ...] = ()
    meanings: tuple[tuple[int, str], ...] = ()
    whole: bool = True

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def id(self) -> str:
        """A hash of its rows in their order."""
        content = json.dumps([*self.keys, *self.metrics])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def halves(self) -> list["Chunk"]:
        """Two chunks of half its rows each, to find a row that cannot be run."""
        middle = (len(self) + 1) // 2
        return [self.part(0, middle), self.part(middle, len(self))]

    def part(self, begin: int, end: int) -> "Chunk":
        """Some of its rows."""
        names = ("keys", "rows", "items", "about", "unsteered")
        fields = {name: getattr(self, name)[begin:end] for name in names}
        return replace(self, **fields, whole=False)


def kind(item: Item) -> tuple[bool, bool, bool]:
    """What decides which metrics apply to an item; only items of one kind share a chunk."""
    return item.continuation is not None, item.positive is not None, bool(item.choices)


def measure(engine: Engine, chunk: Chunk, report: Report | None = None) -> list[Record]:
    """Runs a chunk and gives a record for each row. Text is generated only if a metric needs it.

    Raises:
        RunError: a metric differs from the one where the chunk was made: its file may be another
            one on this machine.
    """
    for name, meaning in zip(chunk.metrics, chunk.meanings, strict=False):
        if measures.find(name).meaning != meaning:
            raise RunError(f"the file of {name} is another one here than where the study began")
    applicable = [
        m for m in map(measures.find, chunk.metrics) if all(m.applies(i) for i in chunk.items)
    ]
    # held, so that what is generated, read and measured of the chunk shares them
    steerings = [engine.admission.steering(row.steer) for row in chunk.rows]
    measured = Measured(
        engine, chunk.rows, chunk.items, (), chunk.concept, batch=len(chunk), report=report
    )
    generated = any(m.needs == "text" for m in applicable)
    forced: Sequence[tuple[int, ...] | None] = chunk.unsteered
    plain = not any(
        row.steer or "prompting" in about
        for row, about in zip(chunk.rows, chunk.about, strict=True)
    )
    if plain and any(m.needs == "unsteered" for m in applicable):
        generated = True  # the answers on which the other rows are read, and these as well
        forced = [result.token_ids for result in measured.results]
    measured.unsteered = [ids or () for ids in forced]
    numbers = {
        metric.name: [
            # without an unsteered answer there is nothing to read
            value if ids is not None or metric.needs != "unsteered" else None
            for value, ids in zip(metric(measured), forced, strict=True)
        ]
        for metric in applicable
    }
    results = measured.results if generated else [None] * len(chunk)
    steps = _step_lengths(engine, chunk, steerings)
    return [
        {
            "key": key,
            **about,
            "delta": step,
            "text": result.text if result else None,
            "tokens": len(result.token_ids) if result else None,
            "token_ids": list(result.token_ids) if result else None,
            "finish": result.finish if result else None,
            "metrics": {
                name: numbers[name][i] if name in numbers else None for name in chunk.metrics
            },
        }
        for i, (key, about, result, step) in enumerate(
            zip(chunk.keys, chunk.about, results, steps, strict=True)
        )
    ]


def _step_lengths(
    engine: Engine, chunk: Chunk, steerings: Sequence[Steering]
) -> list[float | None]:
    """How far each row moves the residual stream at its first site: the norm of what is added.

    A single addition moves it by its own length. Of any other operator it is the mean over the
    prompt's steered positions, from one pass with the steering and one without. None at a single
    head's output, unless it is an addition.
    """
    lengths: list[float | None] = [
        None if row.steer or "prompting" in about else 0.0
        for row, about in zip(chunk.rows, chunk.about, strict=True)
    ]
    todo: dict[Any, list[int]] = {}
    for i, row in enumerate(chunk.rows):
        if not row.steer:
            continue
        site = row.steer[0].sites[0]
        steps = steerings[i].steps[site]
        if len(steps) == 1 and steps[0].kind == "add":
            lengths[i] = steps[0].operands[0].norm().item()
        elif site.head is None:
            todo.setdefault(site, []).append(i)
    for site, members in todo.items():
        prompts = list(dict.fromkeys(chunk.rows[i].prompt for i in members))
        rows = [*(chunk.rows[i] for i in members), *(Row(prompt) for prompt in prompts)]
        scores = engine.score(rows, [()] * len(rows), taps=[site], batch=len(chunk))
        before = dict(zip(prompts, scores[len(members) :], strict=True))
        for i, score in zip(members, scores, strict=False):
            row = chunk.rows[i]
            content = engine.model.encode(row.prompt).content
            steered = row.steer[0].scope.prompt_mask(content)
            moved = (score.taps[site].float() - before[row.prompt].taps[site].float()).norm(dim=-1)
            chosen = [n for n, on in zip(moved.tolist(), steered, strict=True) if on]
            lengths[i] = sum(chosen) / len(chosen) if chosen else None
    return lengths


class Mapper(Protocol):
    """Gives chunks back, in any order, each with its records or with the error."""

    def __call__(self, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, Outcome]]: ...


Start = Callable[[Mapping[str, Any]], AbstractContextManager[Mapper]]
"""Starts a mapper, given the run's manifest; leaving the context stops it."""


class Local:
    """Runs chunks in this process, one after the other."""

    def __init__(self, engine: Engine, report: Report | None = None) -> None:
        self.engine, self.report = engine, report

    def __call__(self, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, Outcome]]:
        for chunk in chunks:
            try:
                outcome: Outcome = measure(self.engine, chunk, self.report)
            except Exception as error:  # any row may fail; the others go on
                outcome = error
            yield chunk, outcome
