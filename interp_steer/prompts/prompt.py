"""Prompts as token ids, with what is known of every token."""

from dataclasses import dataclass, field

from interp_steer.errors import RequestError

Message = tuple[str, str]
"""A chat message: (role, content)."""


@dataclass(frozen=True)
class Encoded:
    """A prompt as token ids, with what is known of every token.

    Attributes:
        ids: token ids; the first one is the model's attention sink, whatever it is.
        content: whether the token is the user's own text, not template or special token.
        answer: index of the first token of the assistant's given answer, or None.
        located: whether all of the user's own text was found; a chat template may rewrite it.
        text: the text that the tokens stand for, the template's included.
    """

    ids: tuple[int, ...]
    content: tuple[bool, ...]
    answer: int | None = None
    located: bool = True
    text: str = field(default="", compare=False, repr=False)


Prompt = str | tuple[Message, ...]
"""Plain text, or the messages of a chat."""

Given = Prompt | Encoded
"""A prompt, or tokens that are taken as they are."""


def chat(user: str, system: str | None = None, answer: str | None = None) -> tuple[Message, ...]:
    """The messages of a one-turn chat.

    Args:
        user: what the user says.
        system: the system prompt; None leaves the template's own default, "" is an empty one.
        answer: the beginning of the assistant's answer, to be continued or scored.
    """
    said = [("system", system), ("user", user), ("assistant", answer)]
    return tuple((role, content) for role, content in said if content is not None)


def is_chat(prompt: object) -> bool:
    """Whether something is messages: a tuple of (role, content) pairs."""
    return isinstance(prompt, tuple) and all(
        isinstance(m, tuple) and len(m) == 2 and all(isinstance(part, str) for part in m)
        for m in prompt
    )


def readable(text: str) -> str:
    """The text itself; raises RequestError if it is no Unicode text (broken bytes)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"character {error.start + 1} of the text is no Unicode character; is it UTF-8?"
        ) from error
    return text


def last_said(prompt: Given) -> str:
    """What is asked: a text, or a chat's last message that is not an answer that was begun."""
    if isinstance(prompt, (str, Encoded)):
        return prompt if isinstance(prompt, str) else prompt.text
    return next((text for role, text in reversed(prompt) if role != "assistant"), prompt[-1][1])
