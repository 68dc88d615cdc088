"""Carrying a study out in a folder: its stages in order, and of each what is missing there."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from interp_steer.engine.engine import Engine
from interp_steer.errors import RunError
from interp_steer.model.model import SteeringModel
from interp_steer.report.run import Run, known, same_date
from interp_steer.results.roles import SETTING
from interp_steer.results.rows import Results, joined
from interp_steer.steering.intervention import line
from interp_steer.steering.scale import Scale
from interp_steer.study import metrics as measures
from interp_steer.study.cell import Cell, Planned
from interp_steer.study.chunk import Chunk, Local, Mapper, Record, Start, kind
from interp_steer.study.description import Description
from interp_steer.study.design import Design
from interp_steer.study.plan import check, forecast
from interp_steer.study.stages import Stage, key_of, stages
from interp_steer.util.console import Report, progress
from interp_steer.util.locking import running

MOST_FAILURES = 20  # rows that fail in a row; then a row that has succeeded is tried again


@dataclass(frozen=True)
class Failure:
    """A row that could not be run, and why."""

    key: str
    what: str
    why: str


def run(
    study: Design,
    model: SteeringModel,
    folder: str | Path,
    *,
    mapper: Start | None = None,
    shard: tuple[int, int] | None = None,
    arguments: Sequence[str] = (),
) -> Run:
    """Runs a study in a folder, or only the rows that are missing there.

    Args:
        mapper: starts what runs the chunks. None: this process runs them.
        shard: (i, n), i from 1: runs every n-th chunk alone, as one job of an array. A cell can be
            chosen only after all shards have run the grid: start the array, or one job, again.
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
        """Settles what the folder describes, before others may start there."""
        nonlocal description
        same_date(folder, model.date)
        description = Description(folder, study, model, about, arguments)
        if not description.same and not alone:
            raise RunError(f"{folder} is being written by a shard of another study")
        if not description.same and (shard or not description.before):
            known(folder, about)  # refuses another model's rows
            description.begin()

    with running(folder, begin, shared=shard is not None):
        assert description is not None
        results = Results(folder / f"rows{part}.jsonl", about)
        rows = known(folder, about, results)
        with _pinned(description.manifest["threads"]), results.writing():
            work = _Work(
                study, model, study.scale(model), description, results, rows, shard or (1, 1)
            )
            try:
                work.run(mapper)
            finally:
                description.failures(list(map(asdict, work.failures)), part, work.complete)
    if failed := work.failures:
        shown = "; ".join(f"{failure.what}: {failure.why}" for failure in failed[:5])
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        others = "every other row" + ("" if shard is None else f" of shard {shard[0]}/{shard[1]}")
        others += "" if work.complete else " that could be run yet"
        raise RunError(f"{len(failed)} rows failed, {others} is done ({folder}): {shown}{more}")
    return Run(folder)


def chunks(study: Design, model: SteeringModel, stage: Stage) -> list[list[tuple[str, Planned]]]:
    """(key, row) of a stage in chunks: items of one kind, short prompts first, each row once."""
    rows = sorted(stage.rows, key=lambda r: (kind(r.item), len(model.encode(r.item.prompt).ids)))
    unique: dict[str, Planned] = {}
    for row in rows:
        unique.setdefault(key_of(study, model, row), row)
    parts: list[list[tuple[str, Planned]]] = []
    for pair in unique.items():
        last = parts[-1] if parts else None
        if last is None or len(last) == study.chunk or kind(last[0][1].item) != kind(pair[1].item):
            parts.append([])
        parts[-1].append(pair)
    return parts


@dataclass
class _Work:
    """A run in progress: which rows are there, which are missing, which have failed."""

    study: Design
    model: SteeringModel
    scale: Scale
    description: Description
    results: Results
    known: dict[str, Mapping[str, Any]]
    shard: tuple[int, int]
    mapper: Mapper = field(init=False)
    report: Report = field(init=False)
    failures: list[Failure] = field(default_factory=list)
    complete: bool = False  # whether every stage is finished
    done: int = 0
    failed_in_row: int = 0  # rows that failed since one succeeded
    sound: Chunk | None = None  # a row of the stage that has succeeded
    lines: dict[str, None] = field(default_factory=dict)  # of the plan, each once

    def run(self, mapper: Start | None) -> None:
        """Goes through the stages, as far as this shard can."""
        study, model = self.study, self.model
        total = sum(forecast(study).values())
        here = nullcontext(Local(Engine(model), self._partly))
        with (
            progress("running the study", total, unit="rows") as report,
            mapper(self.description.manifest) if mapper else here as self.mapper,
        ):
            self.report = lambda done, note="": report(min(total, done))
            for stage in stages(study, model, self.scale, self.known):
                if not self.finish(stage):
                    return
        self.complete = True
        if not self.description.same and not self.failures:
            self.description.begin(self.lines)  # all its rows were there already
        self.description.plan(self.lines, done=True)

    def finish(self, stage: Stage) -> bool:
        """Runs the rows of a stage that are missing; of a shard its own ones alone.

        Returns:
            Whether every row of the stage is there or has failed, so that the next one can be run.
            It is not as long as another shard has not run its rows.
        """
        parts = chunks(self.study, self.model, stage)
        self._write_plan(stage, {id(row): key for part in parts for key, row in part})
        todo = []
        self.sound = None
        for number, part in enumerate(parts):
            # every shard runs the unsteered rows: they are few, and all of its other rows need them
            own = stage.name == "unsteered" or number % self.shard[1] == self.shard[0] - 1
            missing = [(key, row) for key, row in part if not self._has(key, row)]
            self.done += len(part) - len(missing)
            if missing and own:
                todo.append(self._chunk(missing))
            if present := [pair for pair in part if self._has(*pair)]:
                self.sound = self._chunk(present[:1])
        self.report(self.done)
        while todo:
            again: list[Chunk] = []
            for chunk, outcome in self.mapper(todo):
                if isinstance(outcome, Exception):
                    again += self._failed(chunk, outcome)
                else:
                    self._succeeded(chunk, outcome)
            todo = again
        failed = {failure.key for failure in self.failures}
        return all(self._has(key, row) or key in failed for part in parts for key, row in part)

    def _partly(self, done: float, note: str = "") -> None:
        """Progress within a chunk."""
        self.report(self.done + done)

    def _succeeded(self, chunk: Chunk, records: list[Record]) -> None:
        self.description.begin(self.lines)
        self.results.append(records, chunk.id)
        for row in records:
            self.known[row["key"]] = joined(self.known.get(row["key"]), row)
        self.done += len(chunk)
        self.failed_in_row, self.sound = 0, chunk.part(0, 1)
        self.report(self.done)

    def _has(self, key: str, planned: Planned) -> bool:
        """Whether a row is there with every metric that its item can be asked."""
        row = self.known.get(key)
        if row is None:
            return False
        left = set(self.study.metrics) - set(row["metrics"])
        return not any(measures.find(name).applies(planned.item) for name in left)

    def _failed(self, chunk: Chunk, error: Exception) -> list[Chunk]:
        """Its halves, to be tried; a single row is given up.

        Raises:
            RunError: many rows have failed, and no row succeeds any more.
        """
        if len(chunk) > 1:
            return chunk.halves()
        about = chunk.about[0]
        how = about["steer"] or about.get("prompting") or "unsteered"
        what = f"{how} on {about['prompt'][:40]!r}, seed {about['seed']}"
        why = str(error).strip().splitlines()
        self.failures.append(Failure(chunk.keys[0], what, why[-1] if why else repr(error)))
        self.failed_in_row += 1
        if self.failed_in_row == MOST_FAILURES:
            # these may share a reason, such as their prompt, and others may still succeed
            again = self.mapper([self.sound]) if self.sound else ()
            if all(isinstance(outcome, Exception) for _, outcome in again):
                raise self._stopped()
            self.failed_in_row = 0
        return []

    def _stopped(self) -> RunError:
        last = self.failures[-1]
        so = "so does one that had succeeded" if self.sound else "none of this stage has succeeded"
        return RunError(
            f"{len(self.failures)} rows failed, the last {self.failed_in_row} one after the other, "
            f"and {so}; the run stopped there with {len(self.known)} rows in "
            f"{self.description.folder}; the last that failed: {last.what}: {last.why}"
        )

    def _chunk(self, rows: Sequence[tuple[str, Planned]]) -> Chunk:
        unsteered = []
        for _, row in rows:
            plain = Planned(Cell("unsteered"), row.item, row.split, row.seed)
            answer = self.known.get(key_of(self.study, self.model, plain))
            other = row.cell.steer or row.cell.prompting
            ids = answer["token_ids"] if answer and other else None
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
        """The fields of a row's record that are known before it runs."""
        site = row.cell.steer[0].sites[0] if row.cell.steer else None
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
            **({"prompting": str(row.cell.prompting)} if row.cell.prompting else {}),
        }

    def _write_plan(self, stage: Stage, keys: Mapping[int, str]) -> None:
        """Adds the rows of a stage to the plan: which row plays which part.

        A dose is relative to the residual norm on a study's own prompts. The record of a row that
        another study ran has the dose of that study, so the plan keeps the dose of this one.

        Args:
            keys: `id` of a planned row -> its key.
        """
        doses: dict[int, float | None] = {}
        for row in stage.rows:
            cell = row.cell
            key = keys.get(id(row)) or key_of(self.study, self.model, row)
            if id(cell) not in doses:
                doses[id(cell)] = cell.strength("dose", self.scale)
            dose, had = doses[id(cell)], self.known.get(key, {}).get("dose")
            other = dose is not None and had is not None and not math.isclose(dose, had)
            planned = {
                "stage": stage.name,
                "role": cell.role,
                "null": cell.null,
                **dict(zip(SETTING, cell.setting, strict=True)),
                "split": row.split,
                "item": row.item.id,
                "seed": row.seed,
                "key": key,
                **({"dose": dose} if other else {}),
            }
            self.lines[json.dumps(planned, ensure_ascii=False)] = None
        self.description.plan(self.lines)


@contextmanager
def _pinned(threads: int) -> Iterator[None]:
    """So many threads: sums of floating point depend on how they are shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
