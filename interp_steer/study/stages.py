"""The stages of a study: which rows run first, and which rows their results call for."""

import hashlib
import itertools
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
from interp_steer.study.design import SPLITS, Design

FLIPPED = ("add", "add_norm_kept", "clamp")  # operators for which a negative coefficient is a flip


@dataclass(frozen=True)
class Stage:
    """Rows that may run in any order. Which rows a stage has depends on the stages before it."""

    name: str
    rows: Sequence[Planned]


def stages(
    study: Design, model: SteeringModel, scale: Scale, known: Mapping[str, Mapping[str, Any]]
) -> Iterator[Stage]:
    """The stages in order: `unsteered`, `grid`, `prove`.

    There is no `prove` stage if no cell keeps the limits, or if a grid has no `choose` prompts.

    Args:
        scale: of the model, which makes lengths of doses.
        known: rows by key; those of a stage have to be there when the next one is asked for.
    """
    unsteered = Cell("unsteered")
    rows = [row for split in SPLITS for row in _crossed(study, [unsteered], split)]
    rows += _able(study, [unsteered])
    if changed := remeasured(study, model, rows, known):
        note(f"rows here were measured by another form of {', '.join(changed)}; they are run anew")
    yield Stage("unsteered", rows)
    grid = study.grid(scale)
    chosen: Cell | None = grid[0]
    null_cells: list[Cell] = []
    if study.choose:
        null_grids = [
            [study.cell(setting, scale, "null_grid", vectors, number) for setting in study.settings]
            for number, vectors in enumerate(map(study.null_vectors, range(study.selected)))
        ]
        yield Stage("grid", _crossed(study, [*grid, *itertools.chain(*null_grids)], "choose"))
        chosen = choose(study, model, grid, known, scale)
        picked = [choose(study, model, cells, known, scale) for cells in null_grids]
        null_cells = [replace(cell, role="null") for cell in picked if cell is not None]
    elif len(grid) > 1:
        # without a selection the whole grid runs on `prove`, and no cell of it is claimed
        cells = [*grid, *study.prompted()]
        yield Stage("grid", [*_crossed(study, cells, "prove"), *_able(study, cells)])
        return
    if chosen is None:
        return
    beside = controlled(study, chosen.setting, scale, model.n_layers)
    rows = _crossed(study, [*beside, *study.prompted(), *null_cells], "prove")
    rows += _crossed(study, [c for c in beside if c.role in ("chosen", "flip")], "neutral")
    rows += _able(study, [beside[0], *study.prompted()])
    yield Stage("prove", rows)


def choose(
    study: Design,
    model: SteeringModel,
    cells: Sequence[Cell],
    known: Mapping[str, Mapping[str, Any]],
    scale: Scale,
) -> Cell | None:
    """The cell with the largest mean effect on the `choose` prompts. None if none keeps the limits.

    The effect is the difference from the unsteered answer in `choose_by`; positive is better. A
    missing value counts as no effect. Of equal cells the gentlest is chosen, then the first.
    """
    metric = measures.find(study.choose_by)
    unsteered = Cell("unsteered")

    def rows(cell: Cell) -> list[Mapping[str, Any] | None]:
        return [known.get(key_of(study, model, row)) for row in _crossed(study, [cell], "choose")]

    def values(records: Sequence[Mapping[str, Any] | None], name: str) -> list[float | None]:
        return [row["metrics"].get(name) if row else None for row in records]

    before = values(rows(unsteered), metric.name)
    best: list[Cell] = []
    most = -math.inf
    for cell in cells:
        records = rows(cell)
        if any(_beyond(values(records, name), name, limit) for name, limit in study.limits.items()):
            continue
        pairs = zip(values(records, metric.name), before, strict=True)
        moved = [
            metric.sign * (a - b) if a is not None and b is not None else 0.0 for a, b in pairs
        ]
        # rounded, so that equal sums in another order are equal
        effect = round(sum(moved) / len(moved), 9)
        if effect >= most:
            best, most = [*(best if effect == most else []), cell], effect
    first = [next(filter(None, rows(cell)), {}) for cell in best]
    # not the dose of the record: another study may have run the row, with another scale
    doses = [cell.strength("dose", scale) for cell in best]
    return _gentlest(best, [{**r, "dose": d} for r, d in zip(first, doses, strict=True)], scale)


def _gentlest(
    cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]], scale: Scale
) -> Cell | None:
    """The cell that steers least, by the first kind of strength that all cells have; the first cell
    if there is no such kind.

    Cells of one operator are compared by dose, then by what they add relative to the median
    residual norm there, then by coefficient. Of several operators only the second can be compared:
    a clamp's dose is where it clamps to, and an ablation has none.

    Args:
        rows: a record of each cell.
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
        # rounded, as lengths of one dose differ in their last bits
        rank = [round(abs(strength), 6) for strength in strengths if strength is not None]
        if rank and len(rank) == len(cells):
            return cells[rank.index(min(rank))]
    return cells[0] if cells else None


def _beyond(values: Sequence[float | None], name: str, limit: float) -> bool:
    """Whether the mean of the values is worse than a limit, missing ones left out; so is none."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return True
    sign = measures.find(name).sign
    return sign * sum(numbers) / len(numbers) < sign * limit


def key_of(study: Design, model: SteeringModel, row: Planned) -> str:
    """The key of a planned row: hashes of what is run and of what its answer is judged by.

    A third part follows if a metric of the row is not built in or not in its first version.
    """
    judged = f"{row.item.id} {list(study.concept)}"
    tail = hashlib.sha256(judged.encode(errors="surrogatepass")).hexdigest()[:8]
    parts = (study.sampled(row).key(model), tail, measures.meaning(study.metrics, row.item))
    return "-".join(part for part in parts if part)


def remeasured(
    study: Design, model: SteeringModel, rows: Sequence[Planned], known: Mapping[str, Any]
) -> list[str]:
    """Names of metrics by which rows were measured when the metric meant something else."""
    before = {key.rpartition("-")[0] if key.count("-") > 1 else key: key for key in known}
    names: dict[str, None] = {}
    for row in rows:
        key = key_of(study, model, row)
        plain = "-".join(key.split("-")[:2])
        if key in known or plain not in before:
            continue
        measured = known[before[plain]]["metrics"]
        for name in study.metrics:
            metric = measures.find(name)
            if name in measured and metric.applies(row.item) and metric.meaning != (1, ""):
                names[name] = None
    return list(names)


def controlled(study: Design, setting: Setting, scale: Scale, n_layers: int) -> list[Cell]:
    """The chosen cell and its controls. A control that makes no sense for the cell is left out:
    another sign without a coefficient, shuffled labels without a contrast.
    """
    chosen = study.cell(setting, scale, "chosen")
    name, operator, site, level, scope = setting
    cells = [chosen]
    if not operator:
        named = {v.name for step in parse(name, study.vectors) for v in step.directions}
    else:
        named = {name}
        value, unit = Reader(level or "0").only(Reader.coefficient)
        if study.controls.flip and operator in FLIPPED and value:
            turned = f"{-value!r} {unit}".strip()
            flipped = study.cell((name, operator, site, turned, scope), scale, "flip")
            cells.append(replace(flipped, level=level))
        if study.controls.wrong_layer and operator != "latent_clamp":
            cells.append(_elsewhere(chosen, study.vectors[name], scale, n_layers))

    def put(role: str, controls: Sequence[Mapping[str, Vector]]) -> None:
        for number, vectors in enumerate(controls):
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
    """The chosen cell with its layers moved by half the model. Direction and level stay the same:
    a dose becomes a length at the new layer.
    """
    steps: list[Intervention] = []
    value, unit = Reader(chosen.level or "0").only(Reader.coefficient)
    for site in Reader(chosen.site).only(Reader.sites):
        there = replace(site, layer=(site.layer + n_layers // 2) % n_layers)
        own = vector[site.layer] if isinstance(vector, DirectionSet) else vector
        moved = own.at(there.hook_point)
        scope = Reader(chosen.scope).only(Reader.scope)
        steps.append(Intervention(chosen.operator, (moved,), value, unit, (there,), scope))
    return replace(chosen, role="wrong_layer", steer=resolve(steps, scale))


def _crossed(study: Design, cells: Sequence[Cell], split: str) -> list[Planned]:
    items = study.splits[split]
    return [Planned(c, i, split, s) for i in items for s in study.seeds for c in cells]


def _able(study: Design, cells: Sequence[Cell]) -> list[Planned]:
    """Questions of capability; they generate nothing, so that one seed tells."""
    asked = [(split, item) for split, item in study.items() if split not in SPLITS]
    return [Planned(c, i, s, study.seeds[0]) for s, i in asked for c in cells]
