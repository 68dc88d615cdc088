"""Which setting a run chose, or why it has none."""

from typing import TYPE_CHECKING

from interp_steer.errors import RequestError
from interp_steer.report.evidence import Evidence
from interp_steer.report.findings import STATES
from interp_steer.results.built_in import BUILT_IN
from interp_steer.results.declared import of_manifest
from interp_steer.results.roles import Setting, declared_in

if TYPE_CHECKING:
    from interp_steer.report.run import Run


def setting_of(run: "Run") -> Setting:
    """The setting of the chosen cell: direction, operator, site, level, scope.

    Raises:
        RequestError: nothing was chosen, and why.
    """
    for planned in run.plan:
        if planned["role"] == "chosen":
            return declared_in(planned)
    raise RequestError(f"{run.folder} has no chosen setting: {_why(run)}")


def check_model(run: "Run", name: str, fingerprint: str) -> None:
    """Raises RequestError for a model other than the one that the run was made with."""
    was = run.manifest["about"]["model"]
    if fingerprint != was:
        raise RequestError(
            f"{name} is not what {run.folder} was run on: its fingerprint is {fingerprint}, the "
            f"run's {was}; --model NAME uses a model all the same"
        )


def _why(run: "Run") -> str:
    """How far the run has come, as its findings have it."""
    measures, _ = of_manifest(run.manifest, BUILT_IN)
    state = Evidence(run.table(), run.manifest, run.plan, measures, 0.95).state
    if state == "open":
        return STATES[state]
    if state == "beyond":
        limits = ", ".join(f"{n} {limit:g}" for n, limit in run.manifest["limits"].items())
        return f"{STATES[state]} ({limits})"
    return f"{STATES[state]}; `interp-steer study run` goes on with it"
