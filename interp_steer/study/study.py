"""A study: a design, and the call that carries it out.

    study = Study(
        choose=["Describe a walk.", ...], prove=["Tell me about your day.", ...],
        directions={"eiffel": contrast}, sites=["each 10-16"],
        coefficients=["0.4 dose", "0.6 dose"], concept=["Eiffel", "Paris"],
    )
    run = study.run(model, "runs/eiffel")
    run.findings()

`Design` declares the fields. `Study.sweep` is the short way to look at a direction first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_steer.errors import RequestError
from interp_steer.model.model import SteeringModel
from interp_steer.report.run import Run
from interp_steer.steering.grammar import parse
from interp_steer.steering.intervention import Vector, line
from interp_steer.steering.spread import spread
from interp_steer.study import execution
from interp_steer.study.cell import Controls
from interp_steer.study.design import Design

TOGETHER = 256  # rows; a sweep of no more is one batch


@dataclass(frozen=True)
class Study(Design):
    __doc__ = Design.__doc__  # `help(Study)` tells the fields

    def run(self, model: SteeringModel, folder: str | Path, **options: Any) -> Run:
        """Runs the study in a folder, or only what is missing there; see `execution.run`."""
        return execution.run(self, model, folder, **options)

    @classmethod
    def sweep(
        cls,
        lines: str | Sequence[str],
        prompts: Sequence[Any],
        directions: Mapping[str, Vector],
        prove: Sequence[Any] = (),
        controls: int = 19,
        **fields: Any,
    ) -> "Study":
        """A study that shows what every line does to every prompt, and claims nothing.

            Study.sweep("add(joy, {0.2,0.4} dose) at {8-20/4}", prompts, {"joy": joy})

        With `prove` it is a study that claims: `prompts` choose a line, and these test it.

        Args:
            lines: of interventions; braces stand for many (see `spread`).
            prompts: texts, chats, mappings or `Item`s.
            directions: what the names mean.
            prove: held-out prompts.
            controls: random directions that make the same choice among the lines, where there are
                held-out prompts. With 19 the least p is 1/20.
            fields: further ones of a study. The metrics are by default what the lines are judged
                by first (`concept` if there are concept words, else `kl_mean`), `rep3` and
                `surprise`.

        Raises:
            RequestError: a line cannot be read, or two directions have one name.
        """
        used: dict[str, Vector] = {}
        written: dict[str, None] = {}
        for text in (lines,) if isinstance(lines, str) else lines:
            for one in spread(text).lines:
                steps = parse(one, directions)
                gates = [step.gate.direction for step in steps if step.gate]
                for vector in (*(v for step in steps for v in step.directions), *gates):
                    if used.setdefault(vector.name, vector).sha != vector.sha:
                        raise RequestError(f"two directions are called {vector.name!r}")
                written[_unhashed(line(steps), used)] = None
        first = "concept" if fields.get("concept") else "kl_mean"
        fields.setdefault("metrics", (first, "rep3", "surprise"))
        seeds = fields.get("seeds", 0)
        rows = len(written) * len(prompts) * (len(seeds) if isinstance(seeds, Sequence) else 1)
        fields.setdefault("chunk", rows if 0 < rows <= TOGETHER else 128)
        none = Controls(random=0, features=0, shuffled=0, flip=False, wrong_layer=False, selected=0)
        claims = Controls(random=controls, features=0, shuffled=0, selected=controls)
        return cls(
            choose=prompts if prove else (),
            prove=prove or prompts,
            directions=used,
            lines=tuple(written),
            controls=claims if prove else none,
            **fields,
        )


def _unhashed(text: str, used: Mapping[str, Vector]) -> str:
    """A line with names alone: a study keeps its directions, so that it need not name them by their
    content.
    """
    for vector in used.values():
        text = text.replace(vector.label, vector.name)
    return text
