"""OpenAI's routes: `/v1/models`, `/v1/chat/completions`, `/v1/completions`."""

import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from interp_steer.engine.row import Result, Row
from interp_steer.model.site import Site
from interp_steer.prompts.prompt import Given, last_said
from interp_steer.serve.answer import Envelope, chat_choice, text_choice
from interp_steer.serve.body import Chat, Completion, Options, json_of, read
from interp_steer.serve.readings import choices, last_site
from interp_steer.serve.service import Service
from interp_steer.serve.streams import Pieces, Stream, streamed, whole
from interp_steer.serve.worker import Piece
from interp_steer.steering.intervention import line

CHAT_TOKENS, TEXT_TOKENS = 256, 16  # of an answer whose length nobody said


def router(service: Service) -> APIRouter:
    """The routes of a service."""
    app = APIRouter()

    def shown(name: str) -> dict[str, Any]:
        steer = line(service.model_steps(name)) or None
        about = {"object": "model", "created": service.began, "owned_by": "interp-steer"}
        return {"id": name, **about, "steering": steer}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [shown(name) for name in service.models]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return shown(name)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        body: Chat = read(Chat, await json_of(request))
        asked = body.max_completion_tokens or body.max_tokens
        tokens = service.tokens(asked, CHAT_TOKENS, body.prompt)
        rows = _rows(service, body, [body.prompt], tokens)

        def choice(number: int, text: str, end: Piece) -> dict[str, Any]:
            return chat_choice(number, text, end, body.top, service.model.decode_token)

        return await _answer(service, request, body, "chat.completion", rows, body.top, choice)

    @app.post("/v1/completions", response_model=None)
    async def complete(request: Request) -> Response:
        body: Completion = read(Completion, await json_of(request))
        prompts: list[Given] = [
            one if isinstance(one, str) else service.model.encoded(one) for one in body.prompts
        ]
        tokens = min(service.tokens(body.max_tokens, TEXT_TOKENS, one) for one in prompts)
        rows = _rows(service, body, prompts, tokens)

        def choice(number: int, text: str, end: Piece) -> dict[str, Any]:
            echoed = last_said(rows[number].prompt) if body.echo else None
            of, generated = service.model.decode_token, body.max_tokens != 0
            return text_choice(number, text, end, body.logprobs, of, echoed, generated)

        top = body.logprobs
        return await _answer(service, request, body, "text_completion", rows, top, choice)

    return app


async def _answer(
    service: Service,
    request: Request,
    body: Options,
    kind: str,
    rows: Sequence[Row],
    top: int | None,
    choice: Callable[[int, str, Piece], dict[str, Any]],
) -> Response:
    """Runs rows, and streams their answers or gives them whole.

    Args:
        kind: as `Envelope` has it.
        top: so many likeliest tokens are told at every position; None for no probabilities.
        choice: makes a choice of a row's number, text and last piece.
    """
    envelope = Envelope(kind, body.model, line(rows[0].steer), rows[0].seed, body.n or 1)
    stream = Stream(service)
    for row in rows:
        stream.add(row, body.stops, *_probabilities(service, top))
    if body.stream:
        return await streamed(service, stream, _events(stream, envelope, body))
    texts, ends = await whole(request, stream)
    service.answers[200] += 1
    told = [choice(n, text, end) for n, (text, end) in enumerate(zip(texts, ends, strict=True))]
    return JSONResponse(envelope.whole(told, ends))


def _rows(service: Service, body: Options, prompts: Sequence[Given], tokens: int) -> list[Row]:
    """A row for every prompt and choice; choices differ in their seeds."""
    steer = service.steering(body)
    seed = secrets.randbits(31) if body.seed is None else body.seed % 2**31
    sampling = body.sampling(tokens)
    return [
        Row(prompt, steer, sampling, seed + n) for prompt in prompts for n in range(body.n or 1)
    ]


def _probabilities(
    service: Service, top: int | None
) -> tuple[tuple[Site, ...], Callable[[Result], Any] | None]:
    """What a job taps and reads for log probabilities, where they are asked for."""
    if top is None:
        return (), None
    return (last_site(service.model),), lambda result: choices(service.model, result, top)


def _events(
    stream: Stream, envelope: Envelope, body: Options
) -> Callable[[Pieces], AsyncIterator[dict[str, Any]]]:
    """Pieces as OpenAI's clients read them."""

    async def events(pieces: Pieces) -> AsyncIterator[dict[str, Any]]:
        ends: list[Piece] = []
        if envelope.chats:
            for number in range(len(stream.jobs)):
                yield envelope.part(number, "", role="assistant")
        async for number, piece in pieces:
            if piece.text:
                yield envelope.part(number, piece.text)
            if piece.finish:
                ends.append(piece)
                yield envelope.part(number, None, piece.finish)
        if body.usage_wanted:
            yield envelope.end(ends)

    return events
