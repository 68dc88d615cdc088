"""A talk with the unsteered and the steered model, each with its own history.

    talk = Session(model, directions)
    talk.steer("add(joy, 0.4 dose) at 15")
    turn = talk.ask("Describe a walk.")
    talk.take(turn, [result.text for result in Engine(model).generate(turn.rows)])

The terminal's `chat` and the server's page hold one each; neither knows more of a talk than this.
A model without a chat template continues what is typed, every text by itself.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from interp_steer.engine.row import Row, Sampling
from interp_steer.errors import RequestError, nearest
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.prompt import Encoded, Given, Message, Prompt
from interp_steer.steering.grammar import parse
from interp_steer.steering.intervention import Intervention, Vector, brief, line, resolve
from interp_steer.steering.scale import Scale
from interp_steer.util.files import whole

COMMANDS = {
    "/steer": "what is steered now",
    "/steer LINE": "steer by this from now on, such as /steer add(joy, 0.4 dose) at 15",
    "/steer off": "steer by nothing",
    "/compare LINE": "the last question under another line too; the talk stays as it is",
    "/save FILE": "write the talk to a .json file",
    "/reset": "begin a new conversation",
    "/help": "this list",
    "/quit": "end the talk; so does Ctrl-D. Ctrl-C ends an answer",
}
HELP = "\n".join(f"  {name:<13}  {about}" for name, about in COMMANDS.items())
SHORTENED = (
    "the chat template leaves out parts of earlier answers: the model does not read all that "
    "stands above"
)
RESET = "/reset begins a new conversation"
CONTINUES = "no chat template: it continues what you write, every text by itself"


@dataclass(frozen=True)
class Turn:
    """A question, ready to be answered.

    Attributes:
        text: the question.
        rows: unsteered, then steered (with lengths) if anything is steered.
        titles: of the rows.
        room: tokens that an answer may have.
        notes: what a person should know of it.
        asked: what is read, unsteered and steered: the histories with the question.
        kept: False where the answers are shown and forgotten.
    """

    text: str
    rows: tuple[Row, ...]
    titles: tuple[str, ...]
    room: int
    notes: tuple[str, ...]
    asked: tuple[Prompt, Prompt]
    kept: bool = True


@dataclass
class Session:
    """A talk.

    Attributes:
        known: what names in a line mean.
        system: system prompt; None is the template's own.
        sampling: of every answer; the context may leave less room.
        steps: what is steered now.
        scale: the unit of doses; None measures it on the conversation so far, at every turn.
        said: a record of every turn.
    """

    model: SteeringModel
    known: Mapping[str, Vector]
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    steps: tuple[Intervention, ...] = ()
    scale: Scale | None = None
    said: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.model.is_chat and self.system is not None:
            raise RequestError(f"{self.model.name} has no chat template: it takes no system prompt")
        self._check(self.steps)
        self.reset()

    def reset(self) -> None:
        """Begins a new conversation under the same steering."""
        begin: tuple[Message, ...] = () if self.system is None else (("system", self.system),)
        self._begin, self._histories = begin, (begin, begin)
        self.said = []

    def steer(self, text: str) -> None:
        """Steers by a line from now on; "off" is nothing.

        Raises:
            RequestError: it cannot be read or does not fit the model; all stays as it was.
        """
        steps = () if text.strip() == "off" else parse(text, self.known)
        self._check(steps)
        self.steps = steps

    @property
    def on(self) -> str:
        """What is steered, in a sentence."""
        if not self.steps:
            return "Nothing is steered; `/steer add(NAME, 0.4 dose) at 15` does."
        return f"Steered by {line(self.steps)}."

    @property
    def last(self) -> tuple[Given, str]:
        """What the unsteered model read last, and its answer.

        Raises:
            RequestError: nothing was asked yet.
        """
        if not self.said:
            raise RequestError("nothing was asked yet")
        turn, history = self.said[-1], self._histories[0]
        return (history[:-1] if self.model.is_chat else turn["user"]), turn["unsteered"]

    def ask(self, text: str) -> Turn:
        """The next question to both.

        Raises:
            RequestError: as `SteeringModel.encode` does; once it has begun with the way out.
        """
        return self._turn(text, self._histories, self.steps)

    def compare(self, text: str) -> Turn:
        """The last question again, steered as it was and by another line; nothing is kept.

        Raises:
            RequestError: nothing was asked, or the line cannot be read.
        """
        if not self.said:
            raise RequestError("nothing was asked yet: ask, then /compare LINE")
        steps = parse(text, self.known)
        self._check(steps)
        history = self._histories[1][:-2]
        turn = self._turn(self.said[-1]["user"], (history, history), steps)
        before = self._turn(self.said[-1]["user"], (history, history), self.steps)
        rows = (before.rows[-1], *turn.rows[1:])
        titles = (before.titles[-1], *turn.titles[1:])
        return replace(turn, rows=rows, titles=titles, kept=False)

    def take(self, turn: Turn, texts: Sequence[str]) -> bool:
        """Puts answers into the histories; False where one is empty, which no template takes, so
        that the question is taken back.
        """
        if not turn.kept:
            return True
        if not all(texts):
            return False
        unsteered, steered = texts[0], texts[-1]
        first, second = turn.asked
        if not (isinstance(first, str) or isinstance(second, str)):
            self._histories = (
                (*first, ("assistant", unsteered)), (*second, ("assistant", steered)),
            )  # fmt: skip
        steer = line(turn.rows[-1].steer)
        self.said.append(
            {"user": turn.text, "unsteered": unsteered, "steered": steered, "steer": steer}
        )
        return True

    def command(self, text: str) -> str | Turn:
        """Does what a line that begins with "/" says; gives what to tell, or a turn to answer.

        Raises:
            RequestError: an unknown command, or one that cannot be done.
        """
        name, _, rest = text.partition(" ")
        if name == "/steer":
            if rest.strip():
                self.steer(rest)
            return self.on
        if name == "/compare" and rest.strip():
            return self.compare(rest)
        if name == "/save" and rest.strip():
            return f"Saved {self.save(Path(rest.strip()).expanduser())}."
        if text == "/reset":
            self.reset()
            return "A new conversation."
        if text == "/help":
            return HELP
        names = dict.fromkeys(one.split()[0] for one in COMMANDS)
        if name in names:
            needed = next((one for one in COMMANDS if one.startswith(f"{name} ")), name)
            raise RequestError(f"expected {needed}")
        raise RequestError(f"unknown {name}{nearest(name, names)}")

    def record(self) -> dict[str, object]:
        """The talk as a program reads it."""
        return {
            "model": self.model.name, "fingerprint": self.model.fingerprint,
            "system": self.system, "sampling": asdict(self.sampling), "seed": self.seed,
            "turns": self.said,
        }  # fmt: skip

    def save(self, path: Path) -> Path:
        """Writes the talk, whole or not at all.

        Raises:
            RequestError: nothing was said, or a file of that name is no talk.
        """
        if not self.said:
            raise RequestError("nothing was said yet")
        if path.suffix != ".json":
            raise RequestError(f"{path.name}: expected a .json file")
        if path.exists() and not (
            path.is_file() and '"turns"' in path.read_text("utf-8", "replace")
        ):
            raise RequestError(f"{path} is there, and it is no talk; give another name")
        with whole(path) as part:
            part.write_text(
                json.dumps(self.record(), indent=1, ensure_ascii=False), encoding="utf-8"
            )
        return path

    def _check(self, steps: Sequence[Intervention]) -> None:
        for one in steps:
            one.check(self.model)

    def _turn(
        self,
        text: str,
        histories: tuple[tuple[Message, ...], tuple[Message, ...]],
        steps: tuple[Intervention, ...],
    ) -> Turn:
        first, second = histories
        asked: tuple[Prompt, Prompt] = (text, text)
        if self.model.is_chat:
            asked = (*first, ("user", text)), (*second, ("user", text))
        encoded, notes = self._encoded(asked)
        scale = self.scale or Scale.of(self.model, encoded)
        resolved = resolve(steps, scale)
        longest = max(len(one.ids) for one in encoded)
        room = min(self.sampling.max_new_tokens, self.model.n_ctx - longest)
        now = replace(self.sampling, max_new_tokens=room)
        rows = [Row(asked[0], (), now, self.seed)]
        rows += [Row(asked[1], resolved, now, self.seed)] if resolved else []
        titles = ("unsteered", brief(steps))[: len(rows)]
        return Turn(text, tuple(rows), titles, room, notes, asked)

    def _encoded(self, asked: Sequence[Prompt]) -> tuple[list[Encoded], tuple[str, ...]]:
        """The conversations as tokens, and what the template keeps from the model.

        Templates of models that think leave their thoughts out of earlier answers (DeepSeek-R1's).
        """
        try:
            encoded = [self.model.encode(messages) for messages in asked]
        except RequestError as error:
            if not (self.said and self.model.is_chat):
                raise
            raise RequestError(f"{error}; {RESET}") from error
        shortened = any(
            role == "assistant" and said.strip() not in one.text
            for messages, one in zip(asked, encoded, strict=True)
            if not isinstance(messages, str)
            for role, said in messages
        )
        return encoded, (SHORTENED,) if shortened else ()
