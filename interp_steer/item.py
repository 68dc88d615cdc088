"""An item: one prompt, with what its answer is judged by. The unit of every interval."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from interp_steer.contrast import entries
from interp_steer.errors import RequestError, nearest
from interp_steer.prompt import Prompt, chat, is_chat, readable


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
        """From a text, the messages of a chat, or a mapping with the fields above.

        A mapping may hold `messages`, a list of [role, content], in place of a prompt. It may name
        the prompt `prompt`, `instruction` or `question`, and hold `system` and `answer`, which make
        it a chat, the answer to be continued.

        Args:
            as_chat: makes plain texts the user's message of a chat.
            system: the system prompt of such chats.

        Raises:
            RequestError: something else, an unknown field, or fields that do not go together.
        """
        if isinstance(given, Item):
            return given
        if is_chat(given):
            return cls(given)  # type: ignore[arg-type]  # is_chat has looked
        entry: Mapping[Any, Any] = given if isinstance(given, Mapping) else {"prompt": given}
        if "messages" in entry:
            messages = _messages(entry["messages"])
            rest = {k: v for k, v in entry.items() if k not in ("messages", "corrupted")}
            other = entry.get("corrupted")
            return replace(
                cls.of({"prompt": messages[-1][1], **rest}),
                prompt=messages,
                corrupted=_messages(other) if isinstance(other, list) else other,
            )
        known = ("positive", "negative", "choices", "correct", "continuation", "corrupted")
        names = ("prompt", "instruction", "question")
        said: Any = next((entry[name] for name in names if isinstance(entry.get(name), str)), None)
        if said is None:
            raise RequestError(f"an entry is no prompt: {str(given)[:60]!r}")
        for key in entry:
            if key not in (*known, *names, "system", "answer", "id", "dataset"):
                choices = (*known, "prompt", "system", "answer")
                raise RequestError(f"unknown field {key!r} of a prompt{nearest(key, choices)}")
        fields: dict[str, Any] = {key: entry[key] for key in known if entry.get(key) is not None}
        if isinstance(fields.get("choices"), list):
            fields["choices"] = tuple(fields["choices"])
        texts = (*(fields.get(k) for k in known if k not in ("choices", "correct")),)
        choices = fields.get("choices", ())
        if (
            any(not isinstance(one, str) for one in (*texts, *choices) if one is not None)
            or not isinstance(choices, tuple)
            or type(fields.get("correct", 0)) is not int
        ):
            raise RequestError(f"a field of a prompt is of the wrong kind: {str(given)[:80]}")
        own, answer = entry.get("system", system), entry.get("answer")
        # a text whose continuation is given is a text, not something said to an assistant
        if (as_chat and "continuation" not in fields) or "system" in entry or "answer" in entry:
            if isinstance(fields.get("corrupted"), str):
                fields["corrupted"] = chat(fields["corrupted"], own, answer)
            return cls(chat(said, own, answer), **fields)
        return cls(said, **fields)


def _messages(given: object) -> Prompt:
    """The messages of a chat from lists of [role, content]."""
    pairs = (
        [tuple(m) if isinstance(m, list) else m for m in given] if isinstance(given, list) else []
    )
    if not pairs or not is_chat(tuple(pairs)):
        raise RequestError(f"messages are {str(given)[:60]!r}, expected [[role, content], ...]")
    return tuple(pairs)


def read_items(path: str | Path, *, as_chat: bool = False, system: str | None = None) -> list[Item]:
    """Items from a .txt (one prompt a line), .json or .jsonl file; see `Item.of`.

    Raises:
        RequestError: no such file, empty, or an entry that is no item.
    """
    found = []
    for number, entry in enumerate(entries(path), start=1):
        try:
            found.append(Item.of(entry, as_chat=as_chat, system=system))
        except RequestError as error:
            raise RequestError(f"{path}, entry {number}: {error}") from error
    return found
