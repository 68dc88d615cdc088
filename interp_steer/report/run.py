"""A run: a study carried out in a folder, as far as it has come.

The folder holds all that repeats it: `study.yaml` and `directions/`; `manifest.json`: versions,
arguments, hashes, machine; `plan.jsonl`: which row plays which part; and the rows themselves in
`rows.jsonl` (one such file a shard).
"""

import datetime
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from interp_steer.errors import RequestError, RunError
from interp_steer.report.findings import Findings
from interp_steer.results.roles import SETTING, declared_in, in_parts
from interp_steer.results.rows import Results, joined
from interp_steer.util.files import parse_json, read_lines, read_text, whole
from interp_steer.util.json_shape import COUNT, NONE, NUMBER, misfit

ROWS = "rows*.jsonl"

_MANIFEST = {
    "about": {"model": str, "dtype": str}, "question": str, "metrics": [str], "choose_by": str,
    "limits": {str: NUMBER},
    "controls": {"random": COUNT, "features": COUNT, "shuffled": COUNT, "flip": bool,
                 "wrong_layer": bool},
    "selected": COUNT, "cells": COUNT[1:], "concept": [str],
    "sampling": {"temperature": NUMBER, "top_p": NUMBER, "top_k": int,
                 "repetition_penalty": NUMBER, "max_new_tokens": int},
    "seeds": [int], "chunk": int,
    "prompts": {"build": COUNT, "choose": COUNT, "prove": COUNT, "neutral": COUNT},
    "directions": {str: str}, "model": str, "revision": (str, NONE), "dtype": str, "device": str,
    "n_layers": int, "threads": COUNT[1:4097], "versions": {str: str}, "machine": {str: object},
    "arguments": [str], "modules": [str], "written_at": str,
    "earlier?": [{str: object}], "prompting?": {str: str},
    "capability?": {str: COUNT},
}  # fmt: skip
_PLANNED = {
    "role": str, "null": (int, NONE), "split": str, "item": str, "seed": int, "direction": str,
    "operator": str, "site": str, "level": str, "scope": str, "key": str,
    "dose?": NUMBER,
}  # fmt: skip
_ROW = {
    "prompt": str, "component": (str, NONE), "layer": (int, NONE), "head": (int, NONE),
    "coefficient": (*NUMBER, NONE), "dose": (*NUMBER, NONE), "text": (str, NONE),
    "finish": (str, NONE), "metrics": {str: (*NUMBER, NONE)},
}  # fmt: skip


class Run:
    """What a folder holds of a study.

    Args:
        folder: of the run.

    Raises:
        RequestError: there is no run in it.
        RunError: a file of it is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        found, plan = read_manifest(self.folder), self.folder / "plan.jsonl"
        if found is None:
            raise RequestError(f"no run in {self.folder}: it has no manifest.json")
        self.manifest = found
        lines = read_lines(plan, RunError) if plan.is_file() else ()
        self.plan: list[dict[str, Any]] = [
            parse_json(text, f"{plan}, line {n}", RunError) for n, text in enumerate(lines, 1)
        ]
        for number, one in enumerate(self.plan, start=1):
            if wrong := misfit(one, _PLANNED):
                raise RunError(f"{plan}, line {number}, is damaged: {wrong}")

    @cached_property
    def rows(self) -> dict[str, Mapping[str, Any]]:
        """Every row that was run, by key.

        Raises:
            RunError: a row is damaged.
        """
        found = known(self.folder, self.manifest["about"])
        for key, row in found.items():
            if wrong := misfit(row, _ROW):
                raise RunError(f"a row in {self.folder} is damaged: {key[:40]}: {wrong}")
        return found

    def table(self) -> pd.DataFrame:
        """One line for each planned row that was run: its part, its setting, its strength in every
        form, its text and its metrics (a column each, NaN where missing).

        A setting that was declared as a whole line is there in parts, see `roles.in_parts`.
        `coefficient` and `delta` are lengths in the residual stream, `dose` a share of its median
        length, `of_max` of a feature's largest activation; of several sites their mean.
        """
        lines = []
        declared = [declared_in(planned) for planned in self.plan]
        parts = in_parts(dict.fromkeys(declared))
        for planned, setting in zip(self.plan, declared, strict=True):
            if (row := self.rows.get(planned["key"])) is not None:
                flat = {k: v for k, v in row.items() if k not in ("metrics", "token_ids", "of")}
                placed = dict(zip(SETTING, parts[setting], strict=True))
                lines.append({**flat, **planned, **placed, **row["metrics"]})
        named = self.manifest["metrics"]
        first = ["role", "null", "split", "item", "seed", "direction", "operator", "site", "level"]
        if not lines:
            return pd.DataFrame(columns=[*first, *named])
        table = pd.DataFrame(lines)
        for name in named:  # one that no row has been asked yet is missing
            table[name] = pd.to_numeric(table[name]) if name in table else math.nan
        for name in ("null", "layer", "head"):
            table[name] = table[name].astype("Int64")
        return table[[*first, *(c for c in table.columns if c not in first)]]

    def save(self, path: str | Path) -> Path:
        """The table as a .parquet or .csv file, whole or not at all.

        Raises:
            RequestError: another kind of file.
        """
        path = Path(path)
        table = self.table()
        if path.suffix not in (".parquet", ".csv"):
            raise RequestError(f"{path.name}: a table is written as .parquet or .csv")
        with whole(path) as part:
            if path.suffix == ".csv":
                table.to_csv(part, index=False)
            else:
                table.to_parquet(part, index=False)
        return path

    def findings(self, level: float = 0.95) -> Findings:
        """What the rows say: intervals, the chosen setting, its controls; see `Findings`.

        Args:
            level: of the intervals.

        Raises:
            RequestError: the run has no unsteered rows yet.
        """
        table = self.table()
        if not (table["role"] == "unsteered").any():
            raise RequestError(f"{self.folder} has no rows yet; run its study first")
        return Findings.of(table, self.manifest, self.plan, level)

    def _repr_html_(self) -> str:
        from interp_steer.util.html import shown

        about = f"<p>{shown(self.folder)}: {len(self.rows)} rows</p>"
        try:
            return about + self.findings()._repr_html_()
        except RequestError:  # nothing was run yet
            return about


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a run's folder says of its rows; None where there is no run.

    Raises:
        RunError: it does not have the shape that it must have.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    told: dict[str, Any] = parse_json(read_text(path, error=RunError), path, RunError)
    wrong = misfit(told, _MANIFEST)
    if wrong is None and not {told["choose_by"], *told["limits"]} <= set(told["metrics"]):
        wrong = "choose_by or a limit is not among the metrics"
    if wrong:
        raise RunError(f"{path} is damaged: {wrong}")
    return told


def same_date(folder: Path, date: datetime.date | None) -> None:
    """Whether the prompts of a run say that date, if their chat template asks for one.

    Runs from before the date was fixed hold the day on which they ran.

    Raises:
        RequestError: they say another, so that none of its rows would be found again.
    """
    manifest = read_manifest(folder)
    if date is None or manifest is None:
        return
    theirs = manifest["date"] if "date" in manifest else str(manifest.get("written_at"))[:10]
    if theirs not in (None, str(date)):
        raise RequestError(
            f"the prompts of {folder} say {theirs}, and these say {date}: its rows would all be "
            f"run again; go on with --date {theirs}, or in another folder"
        )


def known(
    folder: Path, about: Mapping[str, str], opened: Results | None = None
) -> dict[str, Mapping[str, Any]]:
    """Rows of all files of a folder, by key.

    Args:
        opened: one of these files, if it was read already.
    """
    rows: dict[str, Mapping[str, Any]] = {}
    for path in sorted(folder.glob(ROWS)):
        file = opened if opened is not None and opened.path == path else Results(path, about)
        for key, row in file.rows.items():
            rows[key] = joined(rows.get(key), row)
    return rows
