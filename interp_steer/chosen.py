"""Which cell a run chose, or why it has none."""

from typing import TYPE_CHECKING, Any

from interp_steer import metrics as measures
from interp_steer.cell import SETTING, Setting
from interp_steer.errors import RequestError
from interp_steer.model import SteeringModel
from interp_steer.stages import _beyond

if TYPE_CHECKING:
    from interp_steer.runs import Run


def setting_of(run: "Run") -> Setting:
    """The setting of the chosen cell: direction, operator, site, level, scope.

    Raises:
        RequestError: nothing was chosen, and why.
    """
    roles: dict[str, list[dict[str, Any]]] = {}
    for planned in run.plan:
        roles.setdefault(planned["role"], []).append(planned)
    if "chosen" in roles:
        direction, operator, site, level, scope = (str(roles["chosen"][0][p]) for p in SETTING)
        return direction, operator, site, level, scope
    raise RequestError(f"{run.folder} has no chosen cell: {_why(run, roles.get('grid', []))}")


def check_model(run: "Run", model: SteeringModel) -> None:
    """Raises RequestError for a model other than the one that the run was made with."""
    was = run.manifest["about"]["model"]
    if model.fingerprint != was:
        raise RequestError(
            f"{model.name} is not what {run.folder} was run on: its fingerprint is "
            f"{model.fingerprint}, the run's {was}; --model NAME uses a model all the same"
        )


def _why(run: "Run", grid: list[dict[str, Any]]) -> str:
    """Why no cell was chosen of a grid as it was planned."""
    again = "; `interp-steer study run` goes on with it"
    if not grid:
        return f"its study has not come to its grid{again}"
    if missing := sum(row["key"] not in run.rows for row in grid):
        return f"{missing} of the {len(grid)} rows of its grid are not run{again}"
    if grid[0]["split"] != "choose":
        return "its study has no prompts that choose, so that no cell of its grid is chosen"
    limits = run.manifest["limits"]
    said = ", ".join(f"{name} {limit:g}" for name, limit in limits.items())
    cells: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in grid:
        cells.setdefault(tuple(str(row[p]) for p in SETTING), []).append(row)

    def beyond(rows: list[dict[str, Any]], name: str, limit: float) -> bool:
        return _beyond([run.rows[r["key"]]["metrics"].get(name) for r in rows], name, limit)

    if set(limits) <= set(measures.METRICS):
        vetoed = [any(beyond(rows, *one) for one in limits.items()) for rows in cells.values()]
        if all(vetoed):
            return f"none of its {len(cells)} cells stayed within the limits ({said})"
        return f"it was stopped before the choice{again}"
    return f"none stayed within the limits ({said}), or it was stopped before the choice"
