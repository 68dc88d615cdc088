"""A judge at an OpenAI-compatible address: vLLM, llama-server, Ollama, a hosted one."""

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any
from urllib.parse import urlsplit

from interp_steer.errors import RequestError, RunError
from interp_steer.labels.http import Answer, BadAnswer, Clock, RateLimited, Transport, Unreachable

TOKENS = 64  # of a judge's answer; a rating is a line
MORE = 4  # times as many, where they ran out
PATIENCE = 120.0  # seconds that a server may go on failing
TRIES = 6
LEAST = 0.25  # probability of all ratings together below which a judge has not rated
RATING = 2.0  # the highest
REFUSED = (400, 401, 403, 404, 405, 422)  # no other try will do
SCHEMA = {
    "type": "object",
    "properties": {"rating": {"type": "integer", "enum": [0, 1, 2]}},
    "required": ["rating"],
    "additionalProperties": False,
}
EXTRAS: dict[str, Any] = {
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "rating", "schema": SCHEMA, "strict": True},
    },
    "chat_template_kwargs": {"enable_thinking": False},
    "seed": 0,
}
"""What is asked for beside the portable body, and left out where a server does not know it."""


@dataclass(frozen=True)
class Said:
    """A judge's answer, or why there is none.

    Attributes:
        text: what it said; None if nothing came that can be read.
        why: "" or the reason.
        model: as the server names it.
    """

    text: str | None
    why: str = ""
    model: str = ""


class Endpoint:
    """An address that answers chat completions; may be asked from several threads.

    Args:
        url: such as `http://localhost:8000/v1`.
        model: as the server knows it.
        key: sent as a bearer token to this host alone.
        workers: requests at a time.
        sleep: what waiting is, for tests.

    Raises:
        RequestError: no address of that kind.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        *,
        workers: int = 8,
        timeout: float = 60.0,
        patience: float = PATIENCE,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RequestError(f"{url!r} is no address of a judge; expected such as http://host/v1")
        end = "/chat/completions"
        self.url = url.rstrip("/") if url.rstrip("/").endswith(end) else url.rstrip("/") + end
        self.model, self.workers = model, workers
        self._patience, self._sleep = patience, sleep
        self._numbers = count()
        self._extras = dict(EXTRAS)
        self._transport = Transport(
            key, self.url, timeout=timeout, workers=workers, header="Authorization",
            scheme="Bearer ", sleep=sleep,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """What tells its ratings from another judge's."""
        return f"{self.model} at {urlsplit(self.url).netloc}"

    @property
    def extras(self) -> tuple[str, ...]:
        """What the server takes beside the portable body, as far as that is known."""
        return tuple(self._extras)

    def probe(self, prompt: str) -> Said | float:
        """Asks once, before anything depends on it, and finds out what the server takes.

        Raises:
            RequestError: it refuses the request: a wrong key, model or address.
            RunError: it does not answer.
        """
        while True:
            answer = self._post(prompt, TOKENS)
            if answer.status == 200:
                return self._read(answer, prompt)
            if answer.status in (400, 422) and self._extras:
                named = [name for name in self._extras if name in answer.said]
                for name in named or [next(iter(self._extras))]:
                    del self._extras[name]
                continue
            raise RequestError(f"the judge at {self.url} says {answer.status}: {answer.said[:200]}")

    def ask(self, prompt: str) -> Said | float:
        """Its answer to a prompt; what cannot be had is told in `Said.why`.

        Raises:
            RunError: it does not answer any more, or refuses what it took before.
        """
        answer = self._post(prompt, TOKENS)
        if answer.status in (401, 403):
            raise RunError(f"the judge at {self.url} says {answer.status}: {answer.said[:200]}")
        if answer.status != 200:
            return Said(None, f"status {answer.status}: {answer.said[:100]}")
        return self._read(answer, prompt)

    def _read(self, answer: Answer, prompt: str, again: bool = True) -> Said | float:
        try:
            told = answer.json()
            choice = told["choices"][0]
            message, end = choice["message"], choice.get("finish_reason")
            text = message.get("content") or ""
            thought = message.get("reasoning_content") or message.get("reasoning")
        except (BadAnswer, KeyError, IndexError, TypeError, AttributeError):
            return Said(None, "no chat completion")
        model = str(told.get("model") or "")
        if end == "content_filter":
            return Said(None, "content filter", model)
        if end == "length" or (not text and thought):
            if not again:
                return Said(None, "its tokens ran out", model)
            longer = self._post(prompt, TOKENS * MORE)
            if longer.status != 200:
                return Said(None, f"status {longer.status}", model)
            return self._read(longer, prompt, again=False)
        return Said(text, "", model) if text.strip() else Said(None, "an empty answer", model)

    def _body(self, prompt: str, tokens: int) -> dict[str, Any]:
        return {
            "model": self.model, "messages": [{"role": "user", "content": prompt}],
            "temperature": 0, "top_p": 1, "max_tokens": tokens, "stream": False, **self._extras,
        }  # fmt: skip

    def _post(self, prompt: str, tokens: int) -> Answer:
        body = self._body(prompt, tokens)
        wait, problem = 0.5, ""
        for _ in range(TRIES):
            try:
                # a bucket of its own: the transport would hold all others back after one 429
                answer = self._transport.send(
                    "POST", self.url, clock=Clock(self._patience), body=body,
                    bucket=f"judge {next(self._numbers)}",
                )  # fmt: skip
            except RateLimited:
                problem = "too many requests (429)"
            except Unreachable as error:
                raise RunError(f"the judge does not answer any more: {error}") from error
            else:
                if answer.status in REFUSED or answer.status < 400:
                    return answer
                problem = f"status {answer.status}"
            self._sleep(wait * (1 + random.random()))
            wait *= 2
        raise RunError(f"the judge at {self.url}: {problem}, {TRIES} times; run again later")


class WeightedEndpoint(Endpoint):
    """A judge whose first token is read by its probabilities, in place of what it says.

        m_k = p(k) for the likeliest tokens that are whole numbers k = 0..top
        score = sum k m_k / sum m_k, missing where sum m_k < 0.25

    so that a judge that hesitates between two ratings gives one between them (G-Eval, Liu et al.
    2023, arXiv 2303.16634; from 0 to 100 in Betley et al. 2025, arXiv 2502.17424). It is given on
    the scale of ratings, 0 to 2. A server has to tell `logprobs`.

    Args:
        top: of the scale: 9, or 100 where the judge has each of these numbers as one token.
    """

    def __init__(self, *args: Any, top: int = 9, **more: Any) -> None:
        super().__init__(*args, **more)
        if not 1 <= top <= 100:
            raise RequestError(f"a judge's scale from 0 to {top}; expected up to 9, or up to 100")
        self.top = top
        self._extras.pop("response_format")

    @property
    def name(self) -> str:
        return f"{super().name}, probabilities of 0 to {self.top}"

    def _body(self, prompt: str, tokens: int) -> dict[str, Any]:
        asked = (
            f"{prompt}\n\nGive your rating on a finer scale: a whole number from 0 to {self.top}, "
            f"where {self.top} stands for the highest rating above. Answer with the number alone."
        )
        told = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        return {**super()._body(asked, 1), **told}

    def _read(self, answer: Answer, prompt: str, again: bool = True) -> Said | float:
        try:
            told = answer.json()
            likely = told["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            chances: dict[int, float] = {}
            for one in likely:
                text = str(one["token"]).strip()
                if text.isascii() and text.isdecimal() and int(text) <= self.top:
                    number = int(text)
                    chances[number] = chances.get(number, 0.0) + math.exp(float(one["logprob"]))
        except (BadAnswer, KeyError, IndexError, TypeError, AttributeError, ValueError):
            return Said(None, "no probabilities (logprobs) in the answer")
        return expected(chances, RATING / self.top)


def expected(chances: Mapping[int, float], unit: float = 1.0) -> Said | float:
    """The mean rating under probabilities of ratings; missing if they hold too little together."""
    together = sum(chances.values())
    if not together >= LEAST:
        return Said(None, f"the ratings have a probability of {together:.2f} together")
    return unit * sum(k * p for k, p in chances.items()) / together
