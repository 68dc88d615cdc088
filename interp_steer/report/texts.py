"""The text browser of a page: the grid as a table of links, each to the texts of its setting.

It works without a script: a link leads to the setting's part of the page, and only the part that
the address names is shown.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from interp_steer.report.findings import Findings, setting_text
from interp_steer.report.page import as_records, pieces, plain
from interp_steer.report.spots import Spot, places, spots
from interp_steer.results.declared import Declared
from interp_steer.results.roles import SETTING

MOST = 2000  # answers on one page; a phone still opens it
SEED = 16  # of the draw of prompts, where there are too many

Record = dict[str, Any]


@dataclass(frozen=True)
class Link:
    """A cell of the table of links.

    Attributes:
        anchor: of the setting's part of the page.
        number: its mean by the metric that decides.
        shade: from -1 to 1: its effect over the largest one of the grid, worse below 0.
        about: every metric in words.
    """

    anchor: str
    number: str
    shade: float
    about: str


@dataclass(frozen=True)
class Matrix:
    """Settings of one direction, operator, scope and component, by site and strength."""

    name: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Link | None]]]


@dataclass(frozen=True)
class Answers:
    """The part of a page that shows one setting's texts.

    Attributes:
        anchor: its name in the page's address.
        title: the setting as a line of interventions.
        about: every metric, unsteered and steered.
        beside: (arrow, what is there, its anchor) of the settings next to it in the table.
        samples: prompt, and both answers in pieces.
    """

    anchor: str
    title: str
    about: str
    beside: Sequence[tuple[str, str, str]]
    samples: Sequence[Record]


@dataclass(frozen=True)
class Browser:
    """The table of links and what they lead to.

    Attributes:
        first: the anchor that is open when the address names none.
        about: what is shown, in a sentence or two.
    """

    matrices: Sequence[Matrix]
    answers: Sequence[Answers]
    first: str
    about: str


def browser(found: Findings) -> Browser | None:
    """The browser of a run's grid; None if it has no grid, no texts, or more settings than a page
    can show.
    """
    if found.grid.empty:
        return None
    every = found.table
    rows = every[(every["role"] == "grid") & every["text"].notna()]
    settings = found.grid.drop_duplicates("cell")
    if rows.empty or len(settings) > MOST:
        return None
    decides = found.measures[str(found.manifest["choose_by"])]
    at = {tuple(str(r[k]) for k in SETTING): f"t{r['cell']}" for r in as_records(settings)}
    measured: dict[str, dict[str, Record]] = {}
    for r in as_records(found.grid):
        measured.setdefault(f"t{r['cell']}", {})[r["metric"]] = r
    # a metric without any value has no line in the grid: another one gives the places
    metric = decides.name if (found.grid["metric"] == decides.name).any() else None
    placed = spots(found.grid, [metric] if metric else [str(found.grid["metric"].iloc[0])])
    matrices = _matrices(placed, at, measured, decides)
    beside = {a: b for m in matrices for a, b in _beside(m).items()}
    items = list(dict.fromkeys(rows["item"]))
    shown = max(1, min(len(items), MOST // len(settings)))
    if shown < len(items):
        kept = random.Random(SEED).sample(items, shown)
        rows = rows[rows["item"].isin(kept)]
    before = _unsteered(every, rows)
    answers = [
        Answers(
            at[setting],
            setting_text(dict(zip(SETTING, setting, strict=True))),
            _about(measured.get(at[setting], {})),
            beside.get(at[setting], ()),
            _samples(part, before, found.manifest),
        )
        for setting, part in (
            (tuple(map(str, key)), part)
            for key, part in rows.groupby(list(SETTING), sort=False)
        )
        if setting in at
    ]  # fmt: skip
    return Browser(matrices, answers, _first(placed, at, found), _said(found, shown, len(items)))


def _said(found: Findings, shown: int, prompts: int) -> str:
    count = found.manifest["prompts"]["choose"]
    which = "selection prompts" if count else "prompts"
    kept = "" if shown == prompts else f", {shown} drawn at random (seed {SEED})"
    return (
        f"Every setting's answers on the {prompts} {which}{kept}, beside the unsteered ones. A "
        f"number in the table is the mean of {found.manifest['choose_by']}, yellow where it is "
        "better than unsteered and blue where it is worse. A click on it opens its texts."
    )


def _matrices(
    placed: Sequence[Spot],
    at: Mapping[tuple[str, ...], str],
    measured: Mapping[str, Mapping[str, Record]],
    decides: Declared,
) -> list[Matrix]:
    largest = max((abs(s.effect) for s in placed if s.effect == s.effect), default=0.0)

    def link(spot: Spot | None) -> Link | None:
        if spot is None:
            return None
        anchor = at[tuple(str(spot.record[k]) for k in SETTING)]
        effect = spot.effect if spot.effect == spot.effect else 0.0
        number = plain(spot.record["mean"]) if spot.record["metric"] == decides.name else "·"
        shade = decides.sign * effect / largest if largest else 0.0
        return Link(anchor, number, round(shade, 2), _about(measured.get(anchor, {})))

    return [
        Matrix(
            one.name,
            one.levels,
            [(site[1], [link(one.there.get((site, v))) for v in one.levels]) for site in one.sites],
        )
        for one in places(placed)
    ]


def _beside(matrix: Matrix) -> dict[str, list[tuple[str, str, str]]]:
    """Anchor -> the settings above, below, left and right of it."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for i, (_, links) in enumerate(matrix.rows):
        for j, link in enumerate(links):
            if link is None:
                continue
            near = []
            for arrow, down, right in (("↑", -1, 0), ("↓", 1, 0), ("←", 0, -1), ("→", 0, 1)):
                y, x = i + down, j + right
                if not (0 <= y < len(matrix.rows) and 0 <= x < len(matrix.columns)):
                    continue
                if (other := matrix.rows[y][1][x]) is not None:
                    what = matrix.rows[y][0] if down else matrix.columns[x]
                    near.append((arrow, what, other.anchor))
            found[link.anchor] = near
    return found


def _first(placed: Sequence[Spot], at: Mapping[tuple[str, ...], str], found: Findings) -> str:
    """The chosen setting; where none is chosen, the first one."""
    spot = next((s for s in placed if s.is_at(found.chosen)), placed[0])
    return at[tuple(str(spot.record[k]) for k in SETTING)]


def _unsteered(every: pd.DataFrame, rows: pd.DataFrame) -> dict[tuple[str, int], Record]:
    plain_rows = every[(every["role"] == "unsteered") & every["item"].isin(set(rows["item"]))]
    return {(r["item"], r["seed"]): r for r in as_records(plain_rows)}


def _about(measured: Mapping[str, Record]) -> str:
    return "; ".join(
        f"{name} {plain(r['unsteered'])} → {plain(r['mean'])}" for name, r in measured.items()
    )


def _samples(
    part: pd.DataFrame,
    before: Mapping[tuple[str, int], Record],
    manifest: Mapping[str, Any],
) -> list[Record]:
    """The answers of one setting beside the unsteered ones."""
    concept, seeds = manifest["concept"], manifest["seeds"]
    samples = []
    for after in as_records(part):
        unsteered = before.get((after["item"], after["seed"]))
        sample: Record = {
            "prompt": after["prompt"] + (f" (seed {after['seed']})" if len(seeds) > 1 else ""),
            "numbers": "; ".join(
                f"{name} {after[name]:.3g}" for name in manifest["metrics"] if pd.notna(after[name])
            ),
        }
        for name, row in (("before", unsteered), ("after", after)):
            text = str(row["text"]) if row and isinstance(row["text"], str) else ""
            sample[name] = pieces(text, concept) if text.strip() else []
            sample[f"{name}_finish"] = row["finish"] if row else None
        samples.append(sample)
    return samples
