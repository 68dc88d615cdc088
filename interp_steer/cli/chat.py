"""A conversation with the steered model beside its unsteered self, each with its own history."""

import sys
from collections.abc import Mapping

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row, Sampling
from interp_steer.errors import RequestError, SteerError
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.prompt import Message
from interp_steer.steering.grammar import parse
from interp_steer.steering.intervention import Intervention, Vector, resolve
from interp_steer.steering.scale import Scale
from interp_steer.util.console import safe, side_by_side


def hold(
    model: SteeringModel,
    line: str,
    directions: Mapping[str, Vector],
    system: str | None,
    sampling: Sampling,
    seed: int,
) -> None:
    """Reads what the user says from stdin until it ends or says `/quit`.

    `/steer LINE` changes the interventions (none without a line), `/reset` forgets what was said.
    A mistake is told and the conversation goes on.
    """
    if not model.is_chat:
        raise RequestError(f"{model.name} has no chat template; use `interp-steer generate --text`")
    engine = Engine(model)
    interventions = _checked(parse(line, directions), model)
    begin: tuple[Message, ...] = () if system is None else (("system", system),)
    histories = [begin, begin]
    while (said := _read()) is not None:
        try:
            if said.startswith("/steer"):
                interventions = _checked(parse(said.removeprefix("/steer"), directions), model)
                continue
            if said == "/reset":
                histories = [begin, begin]
                continue
            if said.startswith("/"):
                raise RequestError(f"unknown {said.split()[0]}; known are /steer, /reset and /quit")
            asked = [(*history, ("user", said)) for history in histories]
            # a dose is measured on the conversation so far
            scale = Scale.of(model, [model.encode(messages) for messages in asked])
            steer = resolve(interventions, scale)
            rows = [Row(asked[0], (), sampling, seed)]
            rows += [Row(asked[1], steer, sampling, seed)] if steer else []
            titles = ["unsteered", "; ".join(str(one) for one in interventions)][: len(rows)]
            texts = side_by_side(engine.stream(rows), titles)
            histories = [
                (*messages, ("assistant", text))
                for messages, text in zip(asked, [texts[0], texts[-1]], strict=True)
            ]
        except SteerError as error:
            print(f"error: {safe(str(error))}", file=sys.stderr)


def _checked(steer: tuple[Intervention, ...], model: SteeringModel) -> tuple[Intervention, ...]:
    for one in steer:
        one.check(model)
    return steer


def _read() -> str | None:
    """The next thing said, or None at the end."""
    while True:
        try:
            said = input("you> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        if said == "/quit":
            return None
        if said:
            return said
