"""Prompts as token ids, with what is known of every token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from interp_steer.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = tuple[str, str]
"""A chat message: (role, content)."""

Prompt = str | tuple[Message, ...]
"""Plain text, or the messages of a chat."""


def chat(user: str, system: str | None = None, answer: str | None = None) -> tuple[Message, ...]:
    """The messages of a one-turn chat.

    Args:
        user: what the user says.
        system: the system prompt; None leaves the template's own default.
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


@dataclass(frozen=True)
class Encoded:
    """A prompt as token ids, with what is known of every token.

    Attributes:
        ids: token ids; the first one is the model's attention sink, whatever it is.
        content: whether the token is the user's own text, not template or special token.
        answer: index of the first token of the assistant's given answer, or None.
    """

    ids: tuple[int, ...]
    content: tuple[bool, ...]
    answer: int | None = None


def encode(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, n_ctx: int, name: str) -> Encoded:
    """Tokens of a text, or of a chat under the model's template with one BOS.

    A chat that ends with an assistant message is left open after it, to be continued.

    Raises:
        RequestError: the prompt is empty or longer than the context, or the model has no
            chat template.
    """
    if isinstance(prompt, str):
        spans = [(0, len(prompt))]
        text, begins, special = prompt, None, True
    else:
        text, spans = _render(tokenizer, prompt, name)
        begins = spans[-1][0] if prompt[-1][0] == "assistant" else None
        special = False  # the template's text holds BOS already
    if not "".join(text[start:end] for start, end in spans).strip():
        raise RequestError("the prompt is empty")
    tokens = tokenizer(
        readable(text),
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    ids = tuple(tokens["input_ids"])
    if len(ids) >= n_ctx:
        raise RequestError(
            f"the prompt is {len(ids)} tokens long and the context of {name} holds "
            f"{n_ctx}, the answer included"
        )
    added = tokenizer.added_tokens_decoder.items()
    special_ids = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
    content = tuple(
        token not in special_ids
        and begin < end
        and any(begin < stop and start < end for start, stop in spans)
        for token, (begin, end) in zip(ids, tokens["offset_mapping"], strict=True)
    )
    answer = None
    if begins is not None:
        ends = [end for _, end in tokens["offset_mapping"]]
        answer = next((i for i, end in enumerate(ends) if end > begins), None)
    return Encoded(ids, content, answer)


def _render(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], name: str
) -> tuple[str, list[tuple[int, int]]]:
    """The template's text, and where in it each message's own content stands."""
    if not messages:
        raise RequestError("the prompt is empty")
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(f"{name} has no chat template; give the prompt as plain text")

    def applied(contents: Sequence[str]) -> str:
        turns = [
            {"role": role, "content": content}
            for (role, _), content in zip(messages, contents, strict=True)
        ]
        opened = messages[-1][0] == "assistant"
        try:
            return str(
                tokenizer.apply_chat_template(
                    turns,
                    tokenize=False,
                    add_generation_prompt=not opened,
                    continue_final_message=opened,
                )
            )
        except Exception as error:  # jinja's own errors, for instance for a wrong role
            raise RequestError(f"the chat template refuses these messages: {error}") from error

    text = applied([content for _, content in messages])
    # Rendering once more with marks for contents leaves the template's own pieces between
    # them; the contents stand in the gaps, however often their words occur elsewhere.
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
    marked = applied(marks)
    spans, cursor = [], 0
    for mark, (_, content) in zip(marks, messages, strict=True):
        before, _, marked = marked.partition(mark)
        start = cursor + len(before)
        shown = next((c for c in (content, content.strip()) if text.startswith(c, start)), None)
        if shown is None or text[cursor:start] != before:
            raise RequestError("the chat template rewrites messages; give plain text instead")
        spans.append((start, start + len(shown)))
        cursor = start + len(shown)
    return text, spans
