"""`interp-steer chat`: a conversation with the steered model beside its unsteered self.

Each of the two has its own history.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from interp_steer.cli import common
from interp_steer.errors import RequestError, SteerError, nearest, note
from interp_steer.util.console import progress, safe, side_by_side

if TYPE_CHECKING:
    from interp_steer.engine.row import Sampling
    from interp_steer.model.model import SteeringModel
    from interp_steer.prompts.prompt import Encoded, Message
    from interp_steer.steering.intervention import Intervention, Vector

Piece = tuple[int, str, str | None]
COMMANDS = {
    "/steer": "what is steered now",
    "/steer LINE": "steer by this from now on, such as /steer add(joy, 0.4 dose) at 15",
    "/steer off": "steer by nothing",
    "/reset": "begin a new conversation",
    "/help": "this list",
    "/quit": "end the talk; so does Ctrl-D. Ctrl-C ends an answer",
}
HELP = "\n".join(f"  {name:<12}  {about}" for name, about in COMMANDS.items())


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

    `/help` lists what else may be typed. Ctrl-C ends an answer, Ctrl-D the talk.
    """
    with progress("starting", every=5):
        from interp_steer.engine.row import Sampling
        from interp_steer.steering.directions import Directions
        from interp_steer.steering.grammar import parse

    known = Directions(named or [])
    interventions = parse(steer, known)
    sampling = Sampling(temperature, top_p, 0, repetition_penalty, max_new_tokens)
    common.check_fits(model, [interventions])
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
    """Answers what is typed until the input ends or a line is `/quit`.

    Raises:
        RequestError: the model is no chat model, or the interventions do not fit it. A mistake in a
            later line is told, and the conversation goes on.
    """
    from interp_steer.engine.engine import Engine
    from interp_steer.engine.row import Row
    from interp_steer.steering.grammar import parse
    from interp_steer.steering.intervention import brief, resolve
    from interp_steer.steering.scale import Scale

    if not model.is_chat:
        raise RequestError(f"{model.name} has no chat template; use `interp-steer generate --text`")
    _check(interventions, model)
    engine = Engine(model)
    begin: tuple[Message, ...] = () if system is None else (("system", system),)
    histories = [begin, begin]
    read = _reader()
    _say(f"You talk to {model.name}. {_on(interventions)} /help lists the commands.")
    while (line := read()) is not None:
        try:
            command, _, rest = line.partition(" ")
            if line == "/steer":
                print(_on(interventions))
                continue
            if command == "/steer":
                changed = () if rest.strip() == "off" else parse(rest, known)
                _check(changed, model)
                interventions = changed
                _say(_on(interventions))
                continue
            if line == "/reset":
                histories = [begin, begin]
                _say("A new conversation.")
                continue
            if line == "/help":
                print(HELP)
                continue
            if line.startswith("/"):
                names = dict.fromkeys(name.split()[0] for name in COMMANDS)
                raise RequestError(f"unknown {command}{nearest(command, names)}")
            asked = [(*history, ("user", line)) for history in histories]
            encoded = _encoded(model, asked, fresh=histories == [begin, begin])
            # a dose is measured on the conversation so far
            resolved = resolve(interventions, Scale.of(model, encoded))
            room = min(sampling.max_new_tokens, model.n_ctx - max(len(one.ids) for one in encoded))
            now = replace(sampling, max_new_tokens=room)
            rows = [Row(asked[0], (), now, seed)]
            rows += [Row(asked[1], resolved, now, seed)] if resolved else []
            titles = ["unsteered", brief(interventions)][: len(rows)]
            finishes: set[str | None] = set()
            with _stopping() as stop:
                texts = side_by_side(_until(stop, engine.stream(rows), finishes), titles)
            if stop.is_set():
                print("(stopped; the answers stand as far as they came)")
            elif "length" in finishes and room < sampling.max_new_tokens:
                print("(cut: the context is full; /reset begins a new conversation)")
            elif "length" in finishes:
                _say(f"(cut after --max-new-tokens {room})")
            if not all(texts):  # a template takes no empty answer
                print("(an answer is empty, so the question is taken back)")
                continue
            histories = [
                (*messages, ("assistant", text))
                for messages, text in zip(asked, [texts[0], texts[-1]], strict=True)
            ]
        except KeyboardInterrupt:  # before the first word of an answer
            if not sys.stdin.isatty():
                raise
            print("(stopped; the question was not asked)")
        except SteerError as error:
            print(f"error: {safe(str(error))}", file=sys.stderr)


def _check(interventions: "tuple[Intervention, ...]", model: "SteeringModel") -> None:
    for intervention in interventions:
        intervention.check(model)


def _say(text: str) -> None:
    """Tells a person what a line changed; a file of answers does not need it."""
    if sys.stdin.isatty():
        print(text)


def _on(interventions: "tuple[Intervention, ...]") -> str:
    """What is steered, in a sentence."""
    if not interventions:
        return "Nothing is steered; `/steer add(NAME, 0.4 dose) at 15` does."
    return safe(f"Steered by {'; '.join(map(str, interventions))}.")


def _encoded(
    model: "SteeringModel", asked: "Sequence[tuple[Message, ...]]", fresh: bool
) -> "list[Encoded]":
    """The conversations as tokens; warns where the template keeps an answer from the model.

    Raises:
        RequestError: as `SteeringModel.encode` does; in a conversation that has begun with the way
            out.
    """
    try:
        encoded = [model.encode(messages) for messages in asked]
    except RequestError as error:
        raise (
            error if fresh else RequestError(f"{error}; /reset begins a new conversation")
        ) from error
    for messages, one in zip(asked, encoded, strict=True):
        if any(role == "assistant" and said.strip() not in one.text for role, said in messages):
            note(
                "the chat template leaves out parts of earlier answers: the model does not read "
                "all that stands above"
            )
            break
    return encoded


@contextmanager
def _stopping() -> "Iterator[threading.Event]":
    """At a terminal sets an event at Ctrl-C, in place of an exception in the midst of a step."""
    stop = threading.Event()
    if not sys.stdin.isatty():
        yield stop
        return
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _until(
    stop: threading.Event, pieces: "Iterator[Piece]", finishes: set[str | None]
) -> "Iterator[Piece]":
    """The pieces until it is stopped; how the answers end is put in a set."""
    for piece in pieces:
        if stop.is_set():
            return
        finishes.add(piece[2])
        yield piece


def _reader() -> "Callable[[], str | None]":
    """A function to the next text that is not empty; None at the end of the input or at `/quit`.

    On a terminal it can be edited, earlier ones come back with the arrow up, also those of earlier
    talks, and a pasted text of several lines is one.
    """
    ask: Callable[[], str] = input
    if sys.stdin.isatty() and sys.stdout.isatty():
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory

        from interp_steer.util.files import cache_dir

        session: PromptSession[str] = PromptSession(
            "you> ", history=FileHistory(str(cache_dir("chat") / "history"))
        )
        ask = lambda: session.prompt()  # noqa: E731

    def read() -> str | None:
        interrupted = False
        while True:
            try:
                line = ask().strip()
            except EOFError:
                return None
            except KeyboardInterrupt:
                if interrupted or ask is input:
                    return None
                interrupted = True
                print("Ctrl-C again, Ctrl-D or /quit ends the talk.")
                continue
            interrupted = False
            if line:
                return None if line == "/quit" else line

    return read
