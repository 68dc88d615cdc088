"""What a study runs, in which order: each stage builds on the rows of the ones before."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from interp_steer.errors import note
from interp_steer.features.matched import matched_features
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.results.roles import Setting
from interp_steer.steering.contrast import Contrast
from interp_steer.steering.direction import Direction, DirectionSet
from interp_steer.steering.grammar import Reader, parse
from interp_steer.steering.intervention import Intervention, Vector, resolve
from interp_steer.steering.scale import Scale
from interp_steer.study import metrics as measures
from interp_steer.study.cell import Cell, Planned
from interp_steer.study.study import Study

FLIPPED = ("add", "add_norm_kept", "clamp")  # operators for which a negative coefficient is a flip


@dataclass(frozen=True)
class Stage:
    """Rows that may run together; each stage builds on the ones before."""

    name: str
    rows: Sequence[Planned]


def stages(
    study: Study, model: SteeringModel, scale: Scale, known: Mapping[str, Mapping[str, Any]]
) -> Iterator[Stage]:
    """The stages in order; `known` has the rows of the earlier ones when the next is asked for.

    Nothing is proved where no cell passes the limits.
    """
    unsteered = Cell("unsteered")
    rows = [Planned(unsteered, i, s, seed) for s, i in study.items() for seed in study.seeds]
    if changed := remeasured(study, model, rows, known):
        note(f"rows here were measured by another form of {', '.join(changed)}; they are run anew")
    yield Stage("unsteered", rows)
    grid = study.grid(scale)
    chosen: Cell | None = grid[0]
    null_cells: list[Cell] = []
    if study.choose:
        nulls: dict[int, list[Cell]] = {}
        for number in range(study.selected):
            vectors = study.null_vectors(number)
            nulls[number] = [
                study.cell(setting, scale, "null_grid", vectors, number)
                for setting in study.settings
            ]
        cells = [*grid, *(cell for one in nulls.values() for cell in one)]
        yield Stage("grid", _crossed(study, cells, "choose"))
        chosen = choose(study, model, grid, known, scale)
        picked = (choose(study, model, mine, known, scale) for mine in nulls.values())
        null_cells = [replace(cell, role="null") for cell in picked if cell is not None]
    elif len(grid) > 1:
        # nothing was chosen: the whole grid is shown on `prove`, and no cell of it is claimed
        yield Stage("grid", _crossed(study, grid, "prove"))
        return
    if chosen is None:
        return
    beside = controlled(study, chosen.setting, scale, model.n_layers)
    rows = _crossed(study, [*beside, *null_cells], "prove")
    rows += _crossed(study, [c for c in beside if c.role in ("chosen", "flip")], "neutral")
    yield Stage("prove", rows)


def choose(
    study: Study,
    model: SteeringModel,
    cells: Sequence[Cell],
    known: Mapping[str, Mapping[str, Any]],
    scale: Scale,
) -> Cell | None:
    """The cell with the largest mean effect on the `choose` prompts, of those within the limits.

    The effect is the difference from the unsteered answer in `choose_by`, in the direction that is
    better; a missing value counts as none. Of equal ones the gentlest wins, then the first of the
    grid.
    """
    metric = measures.find(study.choose_by)
    unsteered = Cell("unsteered")

    def rows(cell: Cell) -> list[Mapping[str, Any] | None]:
        return [known.get(key_of(study, model, row)) for row in _crossed(study, [cell], "choose")]

    def values(found: Sequence[Mapping[str, Any] | None], name: str) -> list[float | None]:
        return [row["metrics"].get(name) if row else None for row in found]

    before = values(rows(unsteered), metric.name)
    best: list[Cell] = []
    most = -math.inf
    for cell in cells:
        found = rows(cell)
        if any(_beyond(values(found, name), name, limit) for name, limit in study.limits.items()):
            continue
        pairs = zip(values(found, metric.name), before, strict=True)
        moved = [
            metric.sign * (a - b) if a is not None and b is not None else 0.0 for a, b in pairs
        ]
        # rounded, so that equal sums in another order are equal
        effect = round(sum(moved) / len(moved), 9)
        if effect >= most:
            best, most = [*(best if effect == most else []), cell], effect
    first = [next(filter(None, rows(cell)), {}) for cell in best]
    # a row that another study has run has the dose that it was on that study's prompts
    doses = [cell.strength("dose", scale) for cell in best]
    return _gentlest(best, [{**r, "dose": d} for r, d in zip(first, doses, strict=True)], scale)


def _gentlest(
    cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]], scale: Scale
) -> Cell | None:
    """The cell that steers least, by strengths of one kind, as a row of each has them; the first
    cell where there are none that all have.

    Of one operator the dose; of several (a clamp's dose is where it clamps to, and an ablation has
    none) the length of what each adds, over the stream's median length there.
    """

    def moved(row: Mapping[str, Any]) -> float | None:
        if row.get("delta") is None or row.get("layer") is None or row.get("component") == "z":
            return None
        return float(row["delta"]) / scale.at(Site(str(row["component"]), int(row["layer"])))

    kinds = [[moved(row) for row in rows]]
    if len({cell.operator for cell in cells}) == 1:
        doses, lengths = ([row.get(name) for row in rows] for name in ("dose", "coefficient"))
        kinds = [doses, *kinds, lengths]
    for strengths in kinds:
        told = [abs(one) for one in strengths if one is not None]
        if told and len(told) == len(cells):
            # rounded, as lengths of one dose differ in their last bits
            rank = [round(one, 6) for one in told]
            return cells[rank.index(min(rank))]
    return cells[0] if cells else None


def _beyond(values: Sequence[float | None], name: str, limit: float) -> bool:
    """Whether the mean of what is not missing is worse than a limit; nothing at all is too."""
    told = [v for v in values if v is not None]
    if not told:
        return True
    sign = measures.find(name).sign
    return sign * sum(told) / len(told) < sign * limit


def key_of(study: Study, model: SteeringModel, row: Planned) -> str:
    """The key of a planned row: the content of the row, what its answer is judged by, and what the
    metrics mean that judge it, where that is not what it was at first.
    """
    judged = f"{row.item.id} {list(study.concept)}"
    tail = hashlib.sha256(judged.encode(errors="surrogatepass")).hexdigest()[:8]
    parts = (study.sampled(row).key(model), tail, measures.meaning(study.metrics, row.item))
    return "-".join(part for part in parts if part)


def remeasured(
    study: Study, model: SteeringModel, rows: Sequence[Planned], known: Mapping[str, Any]
) -> list[str]:
    """Metrics of rows that are known, but by other meanings of these metrics."""
    before = {key.rpartition("-")[0] if key.count("-") > 1 else key: key for key in known}
    found: dict[str, None] = {}
    for row in rows:
        key = key_of(study, model, row)
        plain = "-".join(key.split("-")[:2])
        if key in known or plain not in before:
            continue
        had = known[before[plain]]["metrics"]
        mine = (name for name in study.metrics if measures.METRICS[name].applies(row.item))
        changed = (n for n in mine if n in had and measures.METRICS[n].meaning != (1, ""))
        found.update(dict.fromkeys(changed))
    return list(found)


def controlled(study: Study, setting: Setting, scale: Scale, n_layers: int) -> list[Cell]:
    """The chosen cell and its controls; what cannot be controlled so is left out."""
    chosen = study.cell(setting, scale, "chosen")
    name, operator, site, level, scope = setting
    cells = [chosen]
    if not operator:
        named = {v.name for one in parse(name, study.vectors) for v in one.directions}
    else:
        named = {name}
        value, unit = Reader(level or "0").only(Reader.coefficient)
        if study.controls.flip and operator in FLIPPED and value:
            turned = f"{-value!r} {unit}".strip()
            flipped = study.cell((name, operator, site, turned, scope), scale, "flip")
            cells.append(replace(flipped, level=level))
        if study.controls.wrong_layer and operator != "latent_clamp":
            cells.append(_elsewhere(chosen, study.vectors[name], scale, n_layers))

    def put(role: str, made: Sequence[Mapping[str, Vector]]) -> None:
        for number, vectors in enumerate(made):
            cells.append(study.cell(setting, scale, role, {**study.vectors, **vectors}, number))

    if operator != "latent_clamp":
        put("random", [study.null_vectors(k) for k in range(study.controls.random)])
    contrasts = {n: c for n, c in study.directions.items() if isinstance(c, Contrast)}
    if named & set(contrasts):
        drawn = [study.shuffled(contrasts, k) for k in range(study.controls.shuffled)]
        put("shuffled", drawn)
    features = {n: v for n, v in study.vectors.items() if isinstance(v, Direction) and v.is_feature}
    for n in sorted(named & set(features)):
        count = study.controls.features
        put("features", [{n: v} for v in matched_features(features[n], count)])
    return cells


def _elsewhere(chosen: Cell, vector: Vector, scale: Scale, n_layers: int) -> Cell:
    """The chosen cell with each direction half the model away from its layer, at the same level."""
    steps: list[Intervention] = []
    value, unit = Reader(chosen.level or "0").only(Reader.coefficient)
    for site in Reader(chosen.site).only(Reader.sites):
        there = replace(site, layer=(site.layer + n_layers // 2) % n_layers)
        own = vector[site.layer] if isinstance(vector, DirectionSet) else vector
        moved = own.at(there.hook_point)
        scope = Reader(chosen.scope).only(Reader.scope)
        steps.append(Intervention(chosen.operator, (moved,), value, unit, (there,), scope))
    return replace(chosen, role="wrong_layer", steer=resolve(steps, scale))


def _crossed(study: Study, cells: Sequence[Cell], split: str) -> list[Planned]:
    items = getattr(study, split)
    return [Planned(c, i, split, s) for i in items for s in study.seeds for c in cells]
