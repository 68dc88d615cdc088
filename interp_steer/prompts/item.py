"""An item: one prompt, with what its answer is judged by. The unit of every interval."""

import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from interp_steer.errors import RequestError, note
from interp_steer.prompts.entry import Entry
from interp_steer.prompts.prompt import Prompt, readable


@dataclass(frozen=True)
class Item:
    """A prompt and what is known about it.

    Attributes:
        prompt: text, or the messages of a chat.
        positive, negative: two answers that follow the prompt directly, for propensities and logit
            differences: y+ with the behaviour, y- without it. Their own leading space counts.
        choices: answers of a multiple-choice question, which follow the prompt directly.
        correct: which of `choices` is right, counted from 0.
        continuation: a given text whose loss is measured; such an item generates nothing.
        corrupted: another prompt of the same length in tokens, for resampling and patching.
    """

    prompt: Prompt
    positive: str | None = None
    negative: str | None = None
    choices: tuple[str, ...] = ()
    correct: int | None = None
    continuation: str | None = None
    corrupted: Prompt | None = None

    def __post_init__(self) -> None:
        said = self.prompt if isinstance(self.prompt, tuple) else (("", self.prompt),)
        other = self.corrupted if isinstance(self.corrupted, tuple) else (("", self.corrupted),)
        texts = (self.positive, self.negative, self.continuation, *self.choices)
        for text in (*texts, *(content for _, content in (*said, *other))):
            readable(text or "")
        shown = str(self.prompt)[:60]
        if (self.positive is None) != (self.negative is None):
            raise RequestError(f"{shown!r} needs both answers, positive and negative, or none")
        if self.positive is not None and self.positive == self.negative:
            raise RequestError(f"{shown!r} has the same answer on both sides")
        if self.choices and not 0 <= (-1 if self.correct is None else self.correct) < len(
            self.choices
        ):
            raise RequestError(
                f"{shown!r} has {len(self.choices)} choices and correct={self.correct}; expected "
                f"0-{len(self.choices) - 1}"
            )
        if "" in texts:
            raise RequestError(f"{shown!r} has an empty answer")

    @property
    def id(self) -> str:
        """Eight hexadecimal digits of the content."""
        return hashlib.sha256(repr(self).encode(errors="surrogatepass")).hexdigest()[:8]

    @property
    def text(self) -> str:
        """What is asked, for tables: the text, or the chat's last message."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1][1]

    def as_mapping(self) -> dict[str, Any]:
        """The fields that are given, as `of` reads them back."""
        told = {k: v for k, v in vars(self).items() if v is not None and v != ()}
        if self.choices:
            told["choices"] = list(self.choices)
        if isinstance(self.prompt, str):
            return told
        del told["prompt"]
        if isinstance(self.corrupted, tuple):
            told["corrupted"] = [list(m) for m in self.corrupted]
        return {"messages": [list(m) for m in self.prompt], **told}

    @classmethod
    def of(cls, given: object, *, as_chat: bool = False, system: str | None = None) -> "Item":
        """From a text, the messages of a chat, or a mapping of one of the forms in `entry`.

        Args:
            as_chat: makes plain texts the user's message of a chat.
            system: the system prompt of chats that are made from a text and name none.

        Raises:
            RequestError: something else, or fields that do not go together.
        """
        if isinstance(given, Item):
            return given
        entry = Entry.of(given)
        if entry.unread:
            note(f"fields of a prompt that are not read: {', '.join(entry.unread)}")
        return cls.of_entry(entry, as_chat=as_chat, system=system)

    @classmethod
    def of_entry(cls, entry: Entry, *, as_chat: bool = False, system: str | None = None) -> "Item":
        """The same from an entry that was read."""
        prompt = entry.as_prompt(as_chat, system)
        corrupted = entry.as_corrupted(as_chat, system)
        return cls(
            prompt, entry.positive, entry.negative, entry.choices, entry.correct,
            entry.continuation, corrupted,
        )  # fmt: skip


def asked(prompt: Prompt) -> str:
    """What a prompt asks: the user's texts, or the plain text, in one spelling.

    System prompts, answers, white space and capitals are left out, so that two prompts are alike
    that ask the same question.
    """
    said = [prompt]
    if isinstance(prompt, tuple):
        said = [content for role, content in prompt if role == "user"]
        said = said or [content for _, content in prompt]
    words = unicodedata.normalize("NFKC", " ".join(map(str, said))).casefold().split()
    return " ".join(words)


def digest(text: str) -> str:
    """Eight hexadecimal digits of what was asked, to be kept with what is made from it."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]


def digests(prompts: Iterable[Prompt]) -> str:
    """Digests of what prompts ask, each once, for the source of what is made from them."""
    return " ".join(dict.fromkeys(digest(asked(prompt)) for prompt in prompts))
