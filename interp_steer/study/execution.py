"""Carrying a study out in a folder, as far as it has not come yet."""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from interp_steer.engine.engine import Engine
from interp_steer.errors import RunError
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.report.run import Run, known, same_date
from interp_steer.results.rows import Results, joined
from interp_steer.steering.intervention import line
from interp_steer.steering.scale import Scale
from interp_steer.study import metrics as measures
from interp_steer.study.cell import Cell, Planned
from interp_steer.study.chunk import Chunk, Local, Mapper, Record, kind
from interp_steer.study.description import Description
from interp_steer.study.plan import check, forecast
from interp_steer.study.stages import Stage, key_of, stages
from interp_steer.study.study import Study
from interp_steer.util.console import Report, progress
from interp_steer.util.locking import running

MOST_FAILURES = 20  # rows that fail one after the other before it is asked whether any succeeds


@dataclass(frozen=True)
class Failure:
    """A row that could not be run, and why."""

    key: str
    what: str
    why: str


def run(
    study: Study,
    model: SteeringModel,
    folder: str | Path,
    *,
    mapper: Callable[[Mapping[str, Any]], Any] | None = None,
    shard: tuple[int, int] | None = None,
    arguments: Sequence[str] = (),
) -> Run:
    """Runs a study in a folder, or what is missing of it there.

    Args:
        mapper: gives a context manager that yields the mapper, told the manifest; default this
            process.
        shard: (i, n), i from 1: only every n-th chunk, for one job of an array. What is chosen
            waits until every shard of the grid is there; run the array, or one job, once more.
        arguments: the command line, for the manifest.

    Raises:
        RequestError: the study does not fit the model, or the folder holds another model's rows.
        RunError: rows failed (all others are done), or the disk is full.
    """
    folder = Path(folder)
    study = study.bound(model)
    about = {"model": model.measured(), "dtype": str(model.dtype).removeprefix("torch.")}
    part = "" if shard is None else f"-{shard[0]}-of-{shard[1]}"
    check(study, model)
    description: Description | None = None

    def begin(alone: bool) -> None:
        """Settles what the folder says where others may be at work in it."""
        nonlocal description
        same_date(folder, model.date)
        description = Description(folder, study, model, _manifest(study, model, about, arguments))
        if not description.same and not alone:
            raise RunError(f"{folder} is being written by a shard of another study")
        if not description.same and (shard or not description.before):
            known(folder, about)  # of this model, or refused
            description.begin()

    with running(folder, begin, shared=shard is not None):
        assert description is not None
        results = Results(folder / f"rows{part}.jsonl", about)
        work = _Work(study, model, description, results, known(folder, about), shard)
        with _pinned(description.manifest["threads"]), results.writing():
            work.scale = study.scale(model)
            try:
                work.all(mapper)
            finally:
                description.failures([asdict(one) for one in work.failures], part, work.complete)
    if failed := work.failures:
        told = "; ".join(f"{one.what}: {one.why}" for one in failed[:5])
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        others = "every other row" + ("" if shard is None else f" of shard {shard[0]}/{shard[1]}")
        others += "" if work.complete else " that could be run yet"
        raise RunError(f"{len(failed)} rows failed, {others} is done ({folder}): {told}{more}")
    return Run(folder)


def chunks(study: Study, model: SteeringModel, stage: Stage) -> list[list[tuple[str, Planned]]]:
    """(key, row) of a stage in chunks: items of one kind, short prompts first, each row once."""
    rows = sorted(stage.rows, key=lambda r: (kind(r.item), len(model.encode(r.item.prompt).ids)))
    unique: dict[str, Planned] = {}
    for row in rows:
        unique.setdefault(key_of(study, model, row), row)
    made: list[list[tuple[str, Planned]]] = []
    for pair in unique.items():
        last = made[-1] if made else None
        if last is None or len(last) == study.chunk or kind(last[0][1].item) != kind(pair[1].item):
            made.append([])
        made[-1].append(pair)
    return made


class _Work:
    """The state of a run in progress: what is known, what is missing, what has failed."""

    def __init__(
        self,
        study: Study,
        model: SteeringModel,
        description: Description,
        results: Results,
        known: dict[str, Mapping[str, Any]],
        shard: tuple[int, int] | None,
    ) -> None:
        self.study, self.model, self.description = study, model, description
        self.results, self.known, self.shard = results, known, shard
        self.scale: Scale
        self.mapper: Mapper
        self.report: Callable[[float], None] = lambda done: None
        self.failures: list[Failure] = []
        self.complete = False  # whether every stage was gone through
        self.done = 0
        self._in_row = 0  # rows that failed since one succeeded
        self._sound: Chunk | None = None  # a row of the stage that has succeeded
        self._plan: dict[str, None] = {}

    def all(self, mapper: Callable[[Mapping[str, Any]], Any] | None) -> None:
        """Goes through the stages, as far as this shard can."""
        study, model = self.study, self.model
        total = sum(forecast(study).values())
        with progress("running the study", total, unit="rows") as report:
            self.report = lambda done: report(min(total, done))
            start = mapper(self.description.manifest) if mapper else _here(model, self.partly)
            with start as self.mapper:
                for stage in stages(study, model, self.scale, self.known):
                    if not self.do(stage):
                        return
        self.complete = True
        if not self.description.same and not self.failures:
            self.description.begin(self._plan)  # all its rows were there already
        self.description.plan(self._plan, done=True)

    def partly(self, done: float, note: str = "") -> None:
        """Progress within a chunk."""
        self.report(self.done + done)

    def do(self, stage: Stage) -> bool:
        """Runs what is missing of a stage; False where other shards' rows are missing still."""
        made = chunks(self.study, self.model, stage)
        self._planned(stage, {id(row): key for part in made for key, row in part})
        todo = []
        self._sound = None
        for number, part in enumerate(made):
            # answers that everybody needs are everybody's; they are few
            mine = self.shard is None or stage.name == "unsteered"
            mine = mine or number % self.shard[1] == self.shard[0] - 1  # type: ignore[index]
            missing = [(key, row) for key, row in part if not self._has(key)]
            self.done += len(part) - len(missing)
            if missing and mine:
                todo.append(self._chunk(missing))
            if sound := [pair for pair in part if self._has(pair[0])]:
                self._sound = self._chunk(sound[:1])
        self.report(self.done)
        while todo:
            again: list[Chunk] = []
            for chunk, made_of in self.mapper(todo):
                if isinstance(made_of, Exception):
                    again += self._failed(chunk, made_of)
                else:
                    self._succeeded(chunk, made_of)
            todo = again
        keys = {key for part in made for key, _ in part}
        failed = {one.key for one in self.failures}
        return self.shard is None or all(self._has(key) or key in failed for key in keys)

    def _succeeded(self, chunk: Chunk, made: list[Record]) -> None:
        self.description.begin(self._plan)
        self.results.append(made, chunk.id)
        for row in made:
            self.known[row["key"]] = joined(self.known.get(row["key"]), row)
        self.done += len(chunk)
        self._in_row, self._sound = 0, chunk.part(0, 1)
        self.report(self.done)

    def _has(self, key: str) -> bool:
        row = self.known.get(key)
        return row is not None and set(self.study.metrics) <= set(row["metrics"])

    def _failed(self, chunk: Chunk, error: Exception) -> list[Chunk]:
        if len(chunk) > 1:
            return chunk.halves()
        about = chunk.about[0]
        what = f"{about['steer'] or 'unsteered'} on {about['prompt'][:40]!r}, seed {about['seed']}"
        why = str(error).strip().splitlines()
        self.failures.append(Failure(chunk.keys[0], what, why[-1] if why else repr(error)))
        self._in_row += 1
        if self._in_row == MOST_FAILURES:
            # many rows may fail for one reason, such as their prompt, while others still succeed
            again = self.mapper([self._sound]) if self._sound else ()
            if all(isinstance(made, Exception) for _, made in again):
                raise self._stopped()
            self._in_row = 0
        return []

    def _stopped(self) -> RunError:
        last = self.failures[-1]
        so = "so does one that had succeeded" if self._sound else "none of this stage has succeeded"
        return RunError(
            f"{len(self.failures)} rows failed, the last {self._in_row} one after the other, and "
            f"{so}; the run stopped there with {len(self.known)} rows in "
            f"{self.description.folder}; the last that failed: {last.what}: {last.why}"
        )

    def _chunk(self, rows: Sequence[tuple[str, Planned]]) -> Chunk:
        unsteered = []
        for _, row in rows:
            plain = Planned(Cell("unsteered"), row.item, row.split, row.seed)
            found = self.known.get(key_of(self.study, self.model, plain))
            ids = found["token_ids"] if found and row.cell.steer else None
            unsteered.append(None if ids is None else tuple(ids))
        return Chunk(
            keys=tuple(key for key, _ in rows),
            rows=tuple(self.study.sampled(row) for _, row in rows),
            items=tuple(row.item for _, row in rows),
            about=tuple(self._about(row) for _, row in rows),
            unsteered=tuple(unsteered),
            metrics=tuple(self.study.metrics),
            concept=tuple(self.study.concept),
            meanings=tuple(measures.find(name).meaning for name in self.study.metrics),
        )

    def _about(self, row: Planned) -> Record:
        """What a row's record says of it, beside what comes out."""
        sites = [site for one in row.cell.steer for site in one.sites]
        site: Site | None = sites[0] if sites else None
        return {
            "item": row.item.id,
            "prompt": row.item.text,
            "seed": row.seed,
            "steer": line(row.cell.steer) or None,
            "component": site.component if site else None,
            "layer": site.layer if site else None,
            "head": site.head if site else None,
            "coefficient": row.cell.strength("coefficient", self.scale),
            "dose": row.cell.strength("dose", self.scale),
            "of_max": row.cell.strength("max", self.scale),
        }

    def _planned(self, stage: Stage, keys: Mapping[int, str]) -> None:
        """Writes down which row plays which part.

        A dose is a share of the stream on a study's own prompts. A row that another study has run
        tells the dose that it was there, so the plan tells what it is here.
        """
        doses: dict[int, float | None] = {}
        for row in stage.rows:
            cell = row.cell
            key = keys.get(id(row)) or key_of(self.study, self.model, row)
            if id(cell) not in doses:
                doses[id(cell)] = cell.strength("dose", self.scale)
            dose, had = doses[id(cell)], self.known.get(key, {}).get("dose")
            other = dose is not None and had is not None and not math.isclose(dose, had)
            self._plan[
                json.dumps(
                    {
                        "stage": stage.name,
                        "role": cell.role,
                        "null": cell.null,
                        "direction": cell.direction,
                        "operator": cell.operator,
                        "site": cell.site,
                        "level": cell.level,
                        "scope": cell.scope,
                        "split": row.split,
                        "item": row.item.id,
                        "seed": row.seed,
                        "key": key,
                        **({"dose": dose} if other else {}),
                    },
                    ensure_ascii=False,
                )
            ] = None
        self.description.plan(self._plan)


@contextmanager
def _here(model: SteeringModel, partly: Report) -> Iterator[Local]:
    yield Local(Engine(model), partly)


@contextmanager
def _pinned(threads: int) -> Iterator[None]:
    """So many threads: sums of floating point depend on how they are shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _manifest(
    study: Study, model: SteeringModel, about: Mapping[str, str], arguments: Sequence[str]
) -> dict[str, Any]:
    """Versions, arguments, hashes and machine of this start."""
    versions = {
        name: importlib.metadata.version(name)
        for name in (
            "interp-steer",
            "torch",
            "transformers",
            "transformer-lens",
            "sae-lens",
            "numpy",
        )
    }
    return {
        "about": dict(about),
        "question": study.question,
        "metrics": list(study.metrics),
        "measures": measures.declared(study.metrics),
        "choose_by": study.choose_by,
        "limits": dict(study.limits),
        "controls": asdict(study.controls),
        "selected": study.selected,
        "cells": len(study.settings),
        "concept": list(study.concept),
        "sampling": asdict(study.sampling),
        "seeds": list(study.seeds),
        "chunk": study.chunk,
        "prompts": {n: len(getattr(study, n)) for n in ("build", "choose", "prove", "neutral")},
        "directions": {name: vector.sha for name, vector in study.vectors.items()},
        "model": model.name,
        "revision": model.revision,
        "date": str(model.date) if model.date else None,
        "dtype": about["dtype"],
        "device": str(model.device),
        "n_layers": model.n_layers,
        "threads": torch.get_num_threads(),
        "versions": {**versions, "python": platform.python_version()},
        "machine": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if model.device.type == "cuda" else None,
        },
        "arguments": list(arguments) or sys.argv,
        "modules": [str(m) for m in study.modules],
        "written_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
