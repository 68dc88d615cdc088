"""A study: a design, and the call that carries it out.

    study = Study(
        choose=["Describe a walk.", ...], prove=["Tell me about your day.", ...],
        directions={"eiffel": contrast}, sites=["each 10-16"],
        coefficients=["0.4 dose", "0.6 dose"], concept=["Eiffel", "Paris"],
    )
    run = study.run(model, "runs/eiffel")
    run.findings()

`Design` declares the fields.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_steer.model.model import SteeringModel
from interp_steer.report.run import Run
from interp_steer.study import execution
from interp_steer.study.design import Design


@dataclass(frozen=True)
class Study(Design):
    __doc__ = Design.__doc__  # `help(Study)` tells the fields

    def run(self, model: SteeringModel, folder: str | Path, **options: Any) -> Run:
        """Runs the study in a folder, or only what is missing there; see `execution.run`."""
        return execution.run(self, model, folder, **options)
