"""Carrying a study out in a folder, as far as it has not come yet."""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from interp_steer import metrics as measures
from interp_steer.cell import Cell, Planned
from interp_steer.chunk import Chunk, Local, Mapper, Record, kind
from interp_steer.console import Report, progress
from interp_steer.engine import Engine
from interp_steer.errors import RunError
from interp_steer.files import whole
from interp_steer.intervention import line
from interp_steer.model import SteeringModel
from interp_steer.plan import check, forecast
from interp_steer.results import Results
from interp_steer.runs import Run, known
from interp_steer.scale import Scale
from interp_steer.site import Site
from interp_steer.stages import Stage, key_of, stages
from interp_steer.study import Study
from interp_steer.study_file import write

MOST_FAILURES = 20  # rows that fail one after the other before a run gives up


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
    about = {"model": model.fingerprint, "dtype": str(model.dtype).removeprefix("torch.")}
    name = "rows.jsonl" if shard is None else f"rows-{shard[0]}-of-{shard[1]}.jsonl"
    results = Results(folder / name, about)
    before = known(folder, about)
    check(study, model)
    manifest = _opened(folder, study, model, about, arguments)
    scale = study.scale(model)
    work = _Work(study, model, folder, results, before, shard, scale)
    with _pinned(manifest["threads"]), results.writing():
        total = sum(forecast(study).values())
        with progress("running the study", total, unit="rows") as report:
            work.report = lambda done: report(min(total, done))
            engine = Engine(model)
            start = mapper(manifest) if mapper else _here(engine, work.partly)
            with start as work.mapper:
                for stage in stages(study, model, scale, work.known):
                    if not work.do(stage):
                        break
    failed = [asdict(one) for one in work.failures]
    with whole(folder / "failures.json") as part:
        part.write_text(json.dumps(failed, ensure_ascii=False, indent=1), encoding="utf-8")
    if failed:
        told = "; ".join(f"{one.what}: {one.why}" for one in work.failures[:5])
        more = f" and {len(work.failures) - 5} more" if len(work.failures) > 5 else ""
        raise RunError(
            f"{len(work.failures)} rows failed, every other row is done ({folder}): {told}{more}"
        )
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
        folder: Path,
        results: Results,
        known: dict[str, Mapping[str, Any]],
        shard: tuple[int, int] | None,
        scale: Scale,
    ) -> None:
        self.study, self.model, self.folder = study, model, folder
        self.results, self.known, self.shard = results, known, shard
        self.scale = scale
        self.mapper: Mapper
        self.report: Callable[[float], None] = lambda done: None
        self.failures: list[Failure] = []
        self.done = 0
        self._plan: dict[str, None] = {}

    def partly(self, done: float, note: str = "") -> None:
        """Progress within a chunk."""
        self.report(self.done + done)

    def do(self, stage: Stage) -> bool:
        """Runs what is missing of a stage; False where other shards' rows are missing still."""
        made = chunks(self.study, self.model, stage)
        self._planned(stage, {id(row): key for part in made for key, row in part})
        todo = []
        for number, part in enumerate(made):
            # answers that everybody needs are everybody's; they are few
            mine = self.shard is None or stage.name == "unsteered"
            mine = mine or number % self.shard[1] == self.shard[0] - 1  # type: ignore[index]
            missing = [(key, row) for key, row in part if not self._has(key)]
            self.done += len(part) - len(missing)
            if missing and mine:
                todo.append(self._chunk(missing))
        self.report(self.done)
        while todo:
            again: list[Chunk] = []
            for chunk, made_of in self.mapper(todo):
                if isinstance(made_of, Exception):
                    again += self._failed(chunk, made_of)
                else:
                    self.results.append(made_of, chunk.id)
                    self.known.update({row["key"]: row for row in made_of})
                    self.done += len(chunk)
                    self.report(self.done)
            todo = again
        keys = {key for part in made for key, _ in part}
        failed = {one.key for one in self.failures}
        return self.shard is None or all(self._has(key) or key in failed for key in keys)

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
        if len(self.failures) >= MOST_FAILURES:
            raise RunError(
                f"{len(self.failures)} rows failed and nothing else would succeed; the last: "
                f"{what}: {self.failures[-1].why}"
            )
        return []

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
        )

    def _about(self, row: Planned) -> Record:
        """What a row's record says of it, beside what comes out."""
        strengths = [s for one in row.cell.steer for s in one.strengths(self.scale)]
        sites = [site for one in row.cell.steer for site in one.sites]

        def mean(name: str) -> float | None:
            told = [v for s in strengths if isinstance(v := s[name], (int, float))]
            return sum(told) / len(told) if told and len(told) == len(strengths) else None

        site: Site | None = sites[0] if sites else None
        return {
            "item": row.item.id,
            "prompt": row.item.text,
            "seed": row.seed,
            "steer": line(row.cell.steer) or None,
            "component": site.component if site else None,
            "layer": site.layer if site else None,
            "head": site.head if site else None,
            "coefficient": mean("coefficient"),
            "dose": mean("dose"),
            "of_max": mean("max"),
        }

    def _planned(self, stage: Stage, keys: Mapping[int, str]) -> None:
        """Writes down which row plays which part."""
        for row in stage.rows:
            cell = row.cell
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
                        "key": keys.get(id(row)) or key_of(self.study, self.model, row),
                    },
                    ensure_ascii=False,
                )
            ] = None
        with whole(self.folder / "plan.jsonl") as part:
            part.write_text("".join(text + "\n" for text in self._plan), encoding="utf-8")


@contextmanager
def _here(engine: Engine, partly: Report) -> Iterator[Local]:
    yield Local(engine, partly)


@contextmanager
def _pinned(threads: int) -> Iterator[None]:
    """So many threads: sums of floating point depend on how they are shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _opened(
    folder: Path,
    study: Study,
    model: SteeringModel,
    about: Mapping[str, str],
    arguments: Sequence[str],
) -> dict[str, Any]:
    """The manifest of a run that begins or goes on; a first one pins the number of threads."""
    path = folder / "manifest.json"
    threads = torch.get_num_threads()
    if path.is_file():
        threads = Run(folder).manifest.get("threads", threads)
    write(study, model, folder)
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
    manifest = {
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
        "dtype": about["dtype"],
        "device": str(model.device),
        "n_layers": model.n_layers,
        "threads": threads,
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
    with whole(path) as part:
        part.write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")
    return manifest
