"""What a run's folder says of its rows: `study.yaml`, `directions/`, `manifest.json`, `plan.jsonl`.

Only a run that holds the folder writes them (see `locking`), and they always describe rows that are
there. So when another study is run in the same folder, they change with its first new row, not
before. The shards of a study describe the same: the first one writes it. A shard of another study
is refused as long as any is at work.
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from interp_steer.model.model import SteeringModel
from interp_steer.report.run import read_manifest
from interp_steer.steering.contrast import Contrast
from interp_steer.study import metrics as measures
from interp_steer.study.design import PARTS, SPLITS, Design
from interp_steer.util.files import explained, whole
from interp_steer.util.locking import briefly

LATER: dict[str, Callable[[Any], Any]] = {
    "prompting": dict,
    "capability": lambda items: [item.as_mapping() for item in items],
}
"""Fields that came later, by name: what a study file says of each of their parts."""
OWN = sorted({field.name for field in fields(Design)} - {*PARTS, "directions"})
"""Fields of a study file that are a design's own, by the same names."""
VERSIONS = ("interp-steer", "torch", "transformers", "transformer-lens", "sae-lens", "numpy")
PASSING = ("written_at", "arguments", "earlier")  # of a manifest: they differ at every start
CHANGING = ("versions", "machine", "device")  # of a manifest: a folder's rows may differ in them
APART = ("model", "revision", "modules", "question")  # of a study file: they decide no row


class Description:
    """What a folder says, and what it is to say for a study.

    Args:
        folder: of the run.
        study: bound to the model.
        about: model and dtype, as every file of rows has them.
        arguments: of the command line.

    Raises:
        RunError: the manifest that is there is damaged.
    """

    def __init__(
        self,
        folder: Path,
        study: Design,
        model: SteeringModel,
        about: Mapping[str, str],
        arguments: Sequence[str],
    ) -> None:
        self.folder, self.study, self.model = folder, study, model
        self.before: Mapping[str, Any] = read_manifest(folder) or {}
        self.manifest = _manifest(study, model, about, arguments)
        if self.before:  # a folder's first run pins the threads
            self.manifest["threads"] = self.before["threads"]
        self._begun = False

    @property
    def same(self) -> bool:
        """Whether the folder describes this study already."""
        paths = [Path("study.yaml"), *map(stored, self.study.directions)]
        there = all((self.folder / path).is_file() for path in paths)
        return there and self.before.get("study") == self.manifest["study"]

    def begin(self, lines: Iterable[str] = ()) -> None:
        """Describes the study, before its first new row.

        If rows were run under other versions or on another machine, `earlier` keeps which.

        Args:
            lines: of the plan so far; they replace another study's.
        """
        if self._begun:
            return
        self._begun = True
        if self.same and _lasting(self.before) == _lasting(self.manifest):
            return
        earlier = list(self.before.get("earlier") or ())
        if self.before and any(self.before.get(n) != self.manifest[n] for n in CHANGING):
            earlier.append({n: self.before.get(n) for n in ("written_at", *CHANGING)})
        if not self.same:
            write(self.study, self.model, self.folder)
        with whole(self.folder / "manifest.json") as part:
            manifest = {**self.manifest, **({"earlier": earlier} if earlier else {})}
            part.write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")
        if not self.same:
            self._plan(lines, exactly=True)

    def plan(self, lines: Iterable[str], *, done: bool = False) -> None:
        """Writes which row plays which part.

        Nothing is written as long as the folder describes another study.

        Args:
            lines: of the stages so far.
            done: whether that is all. If not, a longer plan with the same beginning stays.
        """
        if self._begun or self.same:
            with briefly(self.folder):
                self._plan(lines, exactly=done)

    def _plan(self, lines: Iterable[str], exactly: bool) -> None:
        path = self.folder / "plan.jsonl"
        content = "".join(line + "\n" for line in lines).encode()
        with explained(path):
            before = path.read_bytes() if path.is_file() else b""
            if before == content or (not exactly and before.startswith(content)):
                return
            with whole(path) as part:
                part.write_bytes(content)

    def failures(self, failed: Sequence[Mapping[str, str]], part: str, done: bool) -> None:
        """Lists the rows that could not be run.

        Args:
            part: the end of a shard's file names; "" without shards.
            done: whether every stage is through. If so, a run without shards deletes the lists
                of shards.
        """
        path = self.folder / f"failures{part}.json"
        data = json.dumps(failed, ensure_ascii=False, indent=1).encode(errors="replace")
        with explained(path):
            if not path.is_file() or path.read_bytes() != data:
                with whole(path) as new:
                    new.write_bytes(data)
            if done and not part:
                for path in self.folder.glob("failures-*-of-*.json"):
                    path.unlink()


def declared(study: Design, model: SteeringModel) -> dict[str, Any]:
    """The fields of the study file that repeats a study, from a folder with its directions."""
    directions: dict[str, Any] = {}
    for name, given in study.directions.items():
        path = str(stored(name))
        directions[name] = {"contrast": path} if isinstance(given, Contrast) else path
    parts = {
        part: [item.as_mapping() for item in getattr(study, part)] for part in (*SPLITS, "build")
    }
    spec: dict[str, Any] = {
        "question": study.question,
        "model": model.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        **({"revision": model.revision} if model.revision else {}),
        **({"date": str(model.date)} if model.date else {}),
        "directions": directions,
        "prompts": {part: items for part, items in parts.items() if items},
    }
    for name in OWN:
        value = getattr(study, name)
        if name in LATER:
            if value:  # without it a study is the one that earlier versions wrote
                spec[name] = {one: LATER[name](given) for one, given in value.items()}
            continue
        if name in ("controls", "sampling"):
            value = asdict(value)
        spec.setdefault(name, list(value) if isinstance(value, tuple) else value)
    return {**spec, "limits": dict(study.limits)}


def write(study: Design, model: SteeringModel, folder: Path) -> Path:
    """Writes `study.yaml` and the directions beside it: what repeats the study.

    No file takes its name before all of them are written in full.
    """
    import yaml

    path = folder / "study.yaml"
    text = yaml.safe_dump(declared(study, model), sort_keys=False, allow_unicode=True, width=100)
    with ExitStack() as parts:
        parts.enter_context(whole(path)).write_text(text, encoding="utf-8")
        for name, given in study.directions.items():
            given.save(parts.enter_context(whole(folder / stored(name))))
    return path


def stored(name: str) -> Path:
    """Where a direction lies in a run's folder."""
    return Path("directions") / f"{name}.safetensors"


def _manifest(
    study: Design, model: SteeringModel, about: Mapping[str, str], arguments: Sequence[str]
) -> dict[str, Any]:
    """Versions, arguments, hashes and machine of this start."""
    cells = study.prompted()
    questions = {name: len(some) for name, some in study.capability.items()}
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
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
        "prompts": {part: len(getattr(study, part)) for part in PARTS},
        **({"capability": questions} if questions else {}),
        **({"prompting": {c.direction: str(c.prompting) for c in cells}} if cells else {}),
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
        "modules": [str(module) for module in study.modules],
        "written_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "study": _identity(study, model),
    }


def _lasting(manifest: Mapping[str, Any]) -> Any:
    """What does not differ at every start, as JSON gives it back: tuples as lists."""
    kept = {name: value for name, value in manifest.items() if name not in PASSING}
    return json.loads(json.dumps(kept))


def _identity(study: Design, model: SteeringModel) -> str:
    """A hash of all that decides a study's rows and their parts.

    The numbers of its directions and the meanings of its metrics are part of it.
    """
    content = {name: value for name, value in declared(study, model).items() if name not in APART}
    content["meanings"] = {name: measures.find(name).meaning for name in study.metrics}
    content["shas"] = {name: vector.sha for name, vector in study.vectors.items()}
    for name, given in study.directions.items():
        if isinstance(given, Contrast):
            sides = (given.positive, given.negative)
            digest = hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in sides))
            content["shas"][f"contrast {name}"] = digest.hexdigest()
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
