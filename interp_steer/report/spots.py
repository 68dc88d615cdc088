"""The settings of a study's grid with their places in a picture."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from interp_steer.errors import RequestError
from interp_steer.report.marks import Record, number
from interp_steer.results.roles import SETTING

UNITS: dict[str | None, str] = {
    "": "coefficient (residual units)",
    "dose": "dose (coefficient / median residual norm)",
    "max": "coefficient (shares of the feature's largest activation)",
    "raw": "coefficient (multiples of the direction's own length)",
    "deg": "angle (degrees)",
}
LATENT = "coefficient (activation of the feature)"


@dataclass(frozen=True)
class Spot:
    """A line of a grid with its place: which panel, which row of it (a site), how strong."""

    record: Record
    group: tuple[str, str, str, str]  # direction, operator, scope, component
    row: str
    order: tuple[float, ...]
    unit: str | None
    value: float

    @classmethod
    def of(cls, record: Record) -> "Spot":
        name, operator, site, level, scope = (str(record[key]) for key in SETTING)
        if not operator:  # a whole line of interventions is a cell of its own
            group = ("", "", "", "")
            return cls(record, group, textwrap.shorten(name, 60), (-record["cell"],), None, 0.0)
        one = re.fullmatch(r"(\w+) ([\dh,-]+)", site)
        component, where = one.groups() if one else ("", site)
        order = tuple(float(n) for n in re.findall(r"\d+", where))
        strength, _, unit = level.partition(" ")
        group = (name, operator, scope, component)
        try:
            return cls(record, group, where, order, unit, float(strength))
        except ValueError:  # an operator without a coefficient
            return cls(record, group, where, order, None, 0.0)

    @property
    def effect(self) -> float:
        return number(self.record["effect"])

    def is_at(self, chosen: Record | None) -> bool:
        return chosen is not None and all(str(self.record[k]) == str(chosen[k]) for k in SETTING)


def spots(grid: pd.DataFrame, metrics: Sequence[str] = ()) -> list[Spot]:
    """The lines of a grid by metric, default all.

    Raises:
        RequestError: the grid has no such metric, or is empty.
    """
    if grid.empty:
        raise RequestError("the grid is empty")
    there = [str(name) for name in grid["metric"].unique()]
    if missing := [name for name in metrics if name not in there]:
        raise RequestError(f"the grid has no {missing[0]}; it has {', '.join(there)}")
    records = grid.to_dict("records")
    return [Spot.of(r) for name in metrics or there for r in records if r["metric"] == name]


def largest(cells: Sequence[Spot], chosen: Record | None, most: int) -> list[tuple[str, ...]]:
    """The groups with the largest effects on the first metric, the chosen cell's before others."""
    rank: dict[tuple[str, ...], tuple[bool, float]] = {}
    for s in cells:
        ringed, tall = rank.setdefault(s.group, (False, 0.0))
        if s.record["metric"] == cells[0].record["metric"]:
            rank[s.group] = ringed or s.is_at(chosen), max(tall, abs(s.effect))  # NaN is never more
    kept = sorted(rank, key=rank.__getitem__, reverse=True)[:most]
    return [group for group in rank if group in kept]


def names(groups: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Groups by what tells them apart; one alone by all that it is."""
    if len(groups) == 1:
        name, operator, scope, _ = groups[0]
        on = f" on {scope}" if scope not in ("", "all") else ""
        return {groups[0]: f"{operator}({name}){on}" if operator else "interventions"}
    apart = [i for i in range(4) if len({g[i] for g in groups}) > 1]
    return {g: ", ".join(g[i] for i in apart if g[i]) or "interventions" for g in groups}


@dataclass(frozen=True)
class Places:
    """Settings of one direction, operator, scope and component, by site and strength.

    Attributes:
        name: what tells them from the other groups.
        sites: in order; with what orders them, as two long texts may be shortened to one.
        levels: the strengths as text, in order of unit and number.
        there: (site, level) -> the setting.
    """

    name: str
    sites: Sequence[tuple[tuple[float, ...], str]]
    levels: Sequence[str]
    there: Mapping[tuple[tuple[tuple[float, ...], str], str], Spot]


def places(cells: Sequence[Spot]) -> list[Places]:
    """Settings by one metric, in their places."""
    groups: dict[tuple[str, ...], list[Spot]] = {}
    for spot in cells:
        groups.setdefault(spot.group, []).append(spot)
    name = names(list(groups))
    found = []
    for group, members in groups.items():
        levels = sorted({(s.unit or "", s.value, str(s.record["level"])) for s in members})
        found.append(
            Places(
                name[group],
                sorted({(s.order, s.row) for s in members}),
                [text for *_, text in levels],
                {((s.order, s.row), str(s.record["level"])): s for s in members},
            )
        )
    return found


def strength(cells: Sequence[Spot]) -> str:
    """What the axis of coefficients is called; nothing where there are none."""
    units = {s.unit for s in cells}
    if units == {""} and all(s.group[1] == "latent_clamp" for s in cells):
        return LATENT
    if len(units) > 1:
        return "coefficient"
    return UNITS.get(units.pop() if units else None, "")
