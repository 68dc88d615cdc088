"""A run's answers by arm, as a judge rates them: unsteered, steered, prompted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from interp_steer.errors import RequestError
from interp_steer.report.findings import setting_text
from interp_steer.report.run import Run
from interp_steer.results.roles import SETTING
from interp_steer.stats import intervals
from interp_steer.stats.interval import MINIMUM
from interp_steer.tune.endpoint import Endpoint
from interp_steer.tune.judge import Judged, LocalJudge, judge
from interp_steer.tune.ratings import KINDS, Asked, Rubrics
from interp_steer.util.console import Report

ROLES = ("unsteered", "grid", "chosen", "prompted")
BOUNDS = (0.0, 2.0)


@dataclass(frozen=True, eq=False)
class Arms:
    """What a judge says of a run.

    Attributes:
        table: a row for each arm: `arm`, means of `concept`, `instruction`, `fluency`, and of
            `score` with `low`, `high` over prompts (seeds are averaged first); `n` answers,
            `missing` ones, and `missing_zero`, the mean score with what is missing as 0.
        answers: a row for each answer: `arm`, `item`, `seed`, `text`, and its ratings.
        judged: the anchors and the judge's noise.
    """

    table: pd.DataFrame
    answers: pd.DataFrame
    judged: Judged


def judge_run(
    run: Run,
    by: Endpoint | LocalJudge,
    concept: str,
    *,
    rubrics: Rubrics | None = None,
    folder: Path | None = None,
    report: Report | None = None,
) -> Arms:
    """Rates the held-out answers of a run, arm by arm.

    Args:
        concept: what the answers should be about, as a judge is told.
        folder: of the ratings; by default `judge` in the run's folder.

    Raises:
        RequestError: the run has no held-out answers; or as `judge` does.
        RunError: as `judge` does.
    """
    if not concept.strip():
        raise RequestError("the concept is empty; say what the answers should be about")
    table = run.table()
    wanted = table[table["role"].isin(ROLES) & (table["split"] == "prove") & table["text"].notna()]
    if wanted.empty:
        raise RequestError(f"{run.folder} has no answers on held-out prompts to be judged")
    records = wanted.to_dict("records")
    arms = [_arm(record) for record in records]
    asked = [Asked(str(r["prompt"]), str(r["text"]), concept) for r in records]
    place = folder or run.folder / "judge"
    judged = judge(by, asked, place, rubrics=rubrics, report=report)
    answers = wanted[["item", "seed", "text"]].reset_index(drop=True)
    answers = pd.concat([answers.assign(arm=arms), judged.table], axis=1)
    rows = []
    for arm, some in answers.groupby("arm", sort=False):
        by_item = some.groupby("item", sort=False)["score"].mean().dropna().to_numpy(float)
        span = intervals.mean(by_item, bounds=BOUNDS) if len(by_item) >= MINIMUM else None
        rows.append(
            {
                "arm": arm,
                **{kind: some[kind].mean() for kind in KINDS},
                "score": float(by_item.mean()) if len(by_item) else math.nan,
                "low": span.low if span else None,
                "high": span.high if span else None,
                "n": len(some),
                "missing": int(some["score"].isna().sum()),
                "missing_zero": float(some["score"].fillna(0.0).mean()),
            }
        )
    return Arms(pd.DataFrame(rows), answers, judged)


def _arm(record: Mapping[Any, Any]) -> str:
    if record["role"] == "unsteered":
        return "unsteered"
    if record["role"] == "prompted":
        return f"prompt {record['direction']}"
    return setting_text({name: str(record[name]) for name in SETTING})
