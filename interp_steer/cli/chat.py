"""`interp-steer chat`: a conversation with the steered model beside its unsteered self.

Each of the two has its own history.
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from interp_steer.cli import common
from interp_steer.errors import RequestError, SteerError
from interp_steer.util.console import progress, safe, side_by_side

if TYPE_CHECKING:
    from interp_steer.engine.row import Sampling
    from interp_steer.model.model import SteeringModel
    from interp_steer.prompts.prompt import Message
    from interp_steer.steering.intervention import Intervention, Vector


def chat(
    model: common.Model = "starter",
    steer: Annotated[str, common.opt("Interventions, such as 'add(eiffel, 0.3 dose) at 15'.")] = "",
    named: common.Named = None,
    system: common.System = None,
    max_new_tokens: common.MaxNewTokens = 128,
    temperature: common.Temperature = 0.5,
    top_p: common.TopP = 1.0,
    repetition_penalty: common.Penalty = 1.1,
    seed: common.Seed = 0,
    dtype: common.Dtype = None,
    device: common.Device = None,
    date: common.Date = None,
) -> None:
    """Talk to the steered and to the unsteered model, side by side.

    `/steer LINE` steers by other interventions from then on, `/steer` alone by none. `/reset`
    begins a new conversation, `/quit` ends the command.
    """
    with progress("starting", every=5):
        from interp_steer.engine.row import Sampling
        from interp_steer.steering.directions import Directions
        from interp_steer.steering.grammar import parse

    known = Directions(named or [])
    interventions = parse(steer, known)
    sampling = Sampling(temperature, top_p, 0, repetition_penalty, max_new_tokens)
    loaded = common.load(model, dtype, device, date=date)
    hold(loaded, interventions, known, system, sampling, seed)


def hold(
    model: "SteeringModel",
    interventions: "tuple[Intervention, ...]",
    known: "Mapping[str, Vector]",
    system: str | None,
    sampling: "Sampling",
    seed: int,
) -> None:
    """Answers the lines of stdin until they end or one is `/quit`.

    Raises:
        RequestError: the model is no chat model, or the interventions do not fit it. A mistake in a
            later line is told, and the conversation goes on.
    """
    from interp_steer.engine.engine import Engine
    from interp_steer.engine.row import Row
    from interp_steer.steering.grammar import parse
    from interp_steer.steering.intervention import resolve
    from interp_steer.steering.scale import Scale

    if not model.is_chat:
        raise RequestError(f"{model.name} has no chat template; use `interp-steer generate --text`")
    _check(interventions, model)
    engine = Engine(model)
    begin: tuple[Message, ...] = () if system is None else (("system", system),)
    histories = [begin, begin]
    while (line := _read()) is not None:
        try:
            if line.startswith("/steer"):
                changed = parse(line.removeprefix("/steer"), known)
                _check(changed, model)
                interventions = changed
                continue
            if line == "/reset":
                histories = [begin, begin]
                continue
            if line.startswith("/"):
                raise RequestError(f"unknown {line.split()[0]}; known are /steer, /reset and /quit")
            asked = [(*history, ("user", line)) for history in histories]
            # a dose is measured on the conversation so far
            scale = Scale.of(model, [model.encode(messages) for messages in asked])
            resolved = resolve(interventions, scale)
            rows = [Row(asked[0], (), sampling, seed)]
            rows += [Row(asked[1], resolved, sampling, seed)] if resolved else []
            titles = ["unsteered", "; ".join(map(str, interventions))][: len(rows)]
            texts = side_by_side(engine.stream(rows), titles)
            histories = [
                (*messages, ("assistant", text))
                for messages, text in zip(asked, [texts[0], texts[-1]], strict=True)
            ]
        except SteerError as error:
            print(f"error: {safe(str(error))}", file=sys.stderr)


def _check(interventions: "tuple[Intervention, ...]", model: "SteeringModel") -> None:
    for intervention in interventions:
        intervention.check(model)


def _read() -> str | None:
    """The next line that is not empty; None at the end of the input or after `/quit`."""
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        if line:
            return None if line == "/quit" else line
