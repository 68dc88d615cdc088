"""A chunk: rows that are run together, and where that is done.

A mapper takes chunks and gives back each with its records, or with what went wrong. `Local` is this
process; `ray.py` has the other one. Nothing here knows what a study asks.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from interp_steer.engine.bank import steps_at
from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row
from interp_steer.errors import RequestError, RunError, SteerError
from interp_steer.prompts.item import Item
from interp_steer.study import metrics as measures
from interp_steer.study.metrics import Measured
from interp_steer.util.console import Report

Record = dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """Rows of one kind of item, in an order that is fixed by the plan.

    Attributes:
        keys: of the rows' content.
        rows, items: what is run.
        about: what else each row's record says.
        unsteered: token ids of the unsteered answers, for metrics that need them.
        metrics: names.
        concept: words of the concept.
        meanings: of the metrics, as the keys have them; none are not compared.
        whole: whether it is as planned; parts of one that failed are not.
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
        told = json.dumps([*self.keys, *self.metrics])
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    def halves(self) -> list["Chunk"]:
        """Two chunks of half its rows, to find one that cannot be run."""
        middle = (len(self) + 1) // 2
        return [self.part(0, middle), self.part(middle, len(self))]

    def part(self, begin: int, end: int) -> "Chunk":
        """Some of its rows."""
        names = ("keys", "rows", "items", "about", "unsteered")
        fields = {name: getattr(self, name)[begin:end] for name in names}
        return replace(self, **fields, whole=False)


def kind(item: Item) -> tuple[bool, bool, bool]:
    """Items of one kind can be asked the same metrics, and share a chunk."""
    return item.continuation is not None, item.positive is not None, bool(item.choices)


def measure(engine: Engine, chunk: Chunk, report: Report | None = None) -> list[Record]:
    """Runs a chunk: generates if a metric needs text, measures, and gives a record a row.

    Raises:
        RunError: a metric is here another one than where the chunk was made, as its file on
            another machine may be.
    """
    for name, meaning in zip(chunk.metrics, chunk.meanings, strict=False):
        if measures.find(name).meaning != meaning:
            raise RunError(f"the file of {name} is another one here than where the study began")
    applicable = [
        m for m in map(measures.find, chunk.metrics) if all(m.applies(i) for i in chunk.items)
    ]
    measured = Measured(
        engine, chunk.rows, chunk.items, (), chunk.concept, batch=len(chunk), report=report
    )
    generated = any(m.needs == "text" for m in applicable)
    forced: Sequence[tuple[int, ...] | None] = chunk.unsteered
    if not any(row.steer for row in chunk.rows) and any(m.needs == "unsteered" for m in applicable):
        generated = True  # the answers on which the other rows are read, and these as well
        forced = [result.token_ids for result in measured.results]
    measured.unsteered = [ids or () for ids in forced]
    numbers = {
        metric.name: [
            # a row whose unsteered answer could not be had misses what is read on it
            value if ids is not None or metric.needs != "unsteered" else None
            for value, ids in zip(metric(measured), forced, strict=True)
        ]
        for metric in applicable
    }
    results = measured.results if generated else [None] * len(chunk)
    steps = _step_lengths(engine, chunk)
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


def _step_lengths(engine: Engine, chunk: Chunk) -> list[float | None]:
    """Length of what is added at each row's first site: the coefficient where it is an addition,
    else the mean over the steered positions of the prompt, read from a pass with and one without.
    """
    lengths: list[float | None] = [0.0 if not row.steer else None for row in chunk.rows]
    todo: dict[Any, list[int]] = {}
    for i, row in enumerate(chunk.rows):
        if not row.steer:
            continue
        site = row.steer[0].sites[0]
        steps = steps_at(row.steer, site)
        if len(steps) == 1 and steps[0].kind == "add":
            lengths[i] = steps[0].operands[0].norm().item()
        elif site.head is None:
            todo.setdefault(site, []).append(i)
    for site, members in todo.items():
        plain = {chunk.rows[i].prompt: n for n, i in enumerate(members)}
        prompts = list(plain)
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
    """Gives chunks back, in any order, with their records or with what went wrong."""

    def __call__(
        self, chunks: Sequence[Chunk]
    ) -> Iterator[tuple[Chunk, list[Record] | Exception]]: ...


class Local:
    """Runs chunks in this process, one after the other."""

    def __init__(self, engine: Engine, report: Report | None = None) -> None:
        self.engine, self.report = engine, report

    def __call__(self, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, list[Record] | Exception]]:
        for chunk in chunks:
            try:
                made: list[Record] | Exception = measure(self.engine, chunk, self.report)
            except Exception as error:  # any row may fail; the others go on
                made = error
            yield chunk, made


_LOADED: dict[str, dict[str, measures.Metric]] = {}


def load_modules(paths: Sequence[str | Path]) -> None:
    """Runs Python files that define metrics, each once, and once more when it has changed. Where
    two define a metric of one name, that of the last one counts.

    Raises:
        RequestError: a file does not exist or cannot be run.
    """
    for path in map(Path, paths):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise RequestError(f"no Python file {path}") from error
        told = str(path.resolve()).encode() + content
        name = f"interp_steer_module_{hashlib.sha256(told).hexdigest()[:8]}"
        if name not in _LOADED:
            before = dict(measures.METRICS)
            _run(path, content, name)
            now = measures.METRICS.items()
            _LOADED[name] = {key: one for key, one in now if before.get(key) is not one}
        measures.METRICS.update(_LOADED[name])


def _run(path: Path, content: bytes, name: str) -> None:
    """Not by import: compiled files beside it may be of an earlier content with the same length."""
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        text = content.decode(errors="replace").replace("\r\n", "\n")
        vars(module)[measures.CONTENT] = text
        exec(compile(content, str(path), "exec"), vars(module))
    except Exception as error:
        del sys.modules[name]
        if isinstance(error, SteerError):
            raise
        raise RequestError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
