"""`interp-steer chat`: a conversation with the steered model beside its unsteered self.

Each of the two has its own history.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from interp_steer.cli import common
from interp_steer.errors import SteerError, note
from interp_steer.util.console import progress, safe, side_by_side

if TYPE_CHECKING:
    from interp_steer.engine.row import Sampling
    from interp_steer.model.model import SteeringModel
    from interp_steer.steering.intervention import Intervention, Vector

Piece = tuple[int, str, str | None]


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
        RequestError: the interventions do not fit the model, or it has no chat template and takes
            no system prompt. A mistake in a later line is told, and the conversation goes on.
    """
    from interp_steer.engine.engine import Engine
    from interp_steer.serve.session import CONTINUES, RESET, Session

    talk = Session(model, known, system, sampling, seed, interventions)
    engine = Engine(model)
    read = _reader()
    _say(f"You talk to {model.name}. {talk.on} /help lists the commands.")
    if not model.is_chat:
        note(f"{model.name} has {CONTINUES}")
    while (line := read()) is not None:
        try:
            turn = talk.command(line) if line.startswith("/") else talk.ask(line)
            if isinstance(turn, str):
                if line in ("/steer", "/help"):  # asked for, also in a file
                    print(safe(turn))
                else:
                    _say(turn)
                continue
            for told in turn.notes:
                note(told)
            finishes: set[str | None] = set()
            with _stopping() as stop:
                pieces = _until(stop, engine.stream(turn.rows), finishes)
                texts = side_by_side(pieces, turn.titles)
            if stop.is_set():
                print("(stopped; the answers stand as far as they came)")
            elif "length" in finishes and turn.room < sampling.max_new_tokens:
                print("(cut: the context is full" + (f"; {RESET})" if model.is_chat else ")"))
            elif "length" in finishes:
                _say(f"(cut after --max-new-tokens {turn.room})")
            if not talk.take(turn, texts):
                print("(an answer is empty, so the question is taken back)")
        except KeyboardInterrupt:  # before the first word of an answer
            if not sys.stdin.isatty():
                raise
            print("(stopped; the question was not asked)")
        except SteerError as error:
            print(f"error: {safe(str(error))}", file=sys.stderr)


def _say(text: str) -> None:
    """Tells a person what a line changed; a file of answers does not need it."""
    if sys.stdin.isatty():
        print(safe(text))


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
