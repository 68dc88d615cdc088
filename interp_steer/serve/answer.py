"""Results in OpenAI's words."""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from interp_steer.serve.readings import Choice
from interp_steer.serve.worker import Piece

FINISHES = {"stop": "stop", "length": "length", "overflow": "length", "cancelled": "stop"}
Text = Callable[[int], str]
"""The text of one token."""


class Envelope:
    """What all parts of one answer share: id, time, the model's name, what was steered."""

    def __init__(self, kind: str, model: str, steering: str, seed: int, n: int = 1) -> None:
        """`kind` is "chat.completion" or "text_completion"; `n` choices share a prompt."""
        prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
        self.kind, self.n = kind, n
        self.common = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.told = {"steering": steering or None, "seed": seed}

    @property
    def chats(self) -> bool:
        return self.kind.startswith("chat")

    def whole(self, choices: Sequence[dict[str, Any]], pieces: Sequence[Piece]) -> dict[str, Any]:
        """A body with everything."""
        body = {"object": self.kind, **self.common, "choices": list(choices)}
        return {**body, "usage": self.usage(pieces), **self.told}

    def part(
        self, index: int, text: str | None, finish: str | None = None, role: str | None = None
    ) -> dict[str, Any]:
        """One event of a stream."""
        name = FINISHES.get(finish or "")
        if self.chats:
            delta = {"role": role} if role else {}
            delta |= {} if text is None else {"content": text}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": name}
            return {"object": f"{self.kind}.chunk", **self.common, "choices": [choice], **self.told}
        choice = {"index": index, "text": text or "", "logprobs": None, "finish_reason": name}
        return {"object": self.kind, **self.common, "choices": [choice], **self.told}

    def end(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The last event of a stream that counts tokens."""
        kind = f"{self.kind}.chunk" if self.chats else self.kind
        return {"object": kind, **self.common, "choices": [], "usage": self.usage(pieces)}

    def usage(self, pieces: Sequence[Piece]) -> dict[str, int]:
        """Tokens read, each prompt's once, and generated."""
        read, made = sum(p.prompt_tokens for p in pieces), sum(p.tokens for p in pieces)
        read //= self.n
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def chat_choice(index: int, text: str, last: Piece, top: int | None, of: Text) -> dict[str, Any]:
    """A choice of a chat completion."""
    logprobs = None
    if top is not None:
        content = []
        for choice in last.found[last.prompt_tokens :]:
            likely = [_token(of(id), ln) for id, ln in choice.top]
            content.append(_token(of(choice.token_id), choice.logprob) | {"top_logprobs": likely})
        logprobs = {"content": content, "refusal": None}
    message = {"role": "assistant", "content": text, "refusal": None}
    finish = FINISHES.get(last.finish or "")
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}


def _token(text: str, ln: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": ln, "bytes": list(text.encode())}


def text_choice(
    index: int,
    text: str,
    last: Piece,
    top: int | None,
    of: Text,
    prompt: str | None = None,
    generated: bool = True,
) -> dict[str, Any]:
    """A choice of a text completion.

    Args:
        prompt: its text, to be told before the answer (`echo`).
        generated: False where only the prompt was asked for (`max_tokens` 0).
    """
    known = last.found or ()
    shown = known if generated else known[: last.prompt_tokens]
    if prompt is None:
        shown = shown[last.prompt_tokens :]
    logprobs = _text_logprobs(shown, top, of) if top is not None else None
    said = (prompt or "") + (text if generated else "")
    finish = FINISHES.get(last.finish or "") if generated else "length"
    return {"index": index, "text": said, "logprobs": logprobs, "finish_reason": finish}


def _text_logprobs(shown: Sequence[Choice], top: int, of: Text) -> dict[str, Any]:
    """OpenAI's four lists; of two tokens with one text the likelier one is told."""
    tokens = [of(choice.token_id) for choice in shown]
    offsets, at = [], 0
    for token in tokens:
        offsets.append(at)
        at += len(token)
    tops: list[dict[str, float] | None] = []
    for choice, token in zip(shown, tokens, strict=True):
        if choice.logprob is None:
            tops.append(None)
            continue
        likely: dict[str, float] = {}
        for id, ln in choice.top:
            likely.setdefault(of(id), ln)
        if top:
            likely.setdefault(token, choice.logprob)
        tops.append(likely)
    return {
        "tokens": tokens,
        "token_logprobs": [choice.logprob for choice in shown],
        "top_logprobs": tops if top else None,
        "text_offset": offsets,
    }
