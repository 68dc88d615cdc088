"""The routes, and what stands behind them.

service = Service.of(SteeringModel.load("starter"), directions, {"eiffel": "add(...) at 13"})
uvicorn.run(create_app(service))
"""

import asyncio
import json
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from interp_steer.engine.row import Row, Sampling
from interp_steer.errors import RequestError, RunError, nearest
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.prompt import Given
from interp_steer.serve.answer import Envelope, chat_choice, text_choice
from interp_steer.serve.body import Chat, Completion, Options, read
from interp_steer.serve.carriers import carried
from interp_steer.serve.gate import Gate, Limits, error_body
from interp_steer.serve.worker import Full, Job, OutOfMemory, Piece, Worker
from interp_steer.steering.direction import is_name, load
from interp_steer.steering.grammar import parse
from interp_steer.steering.intervention import Intervention, Vector, line, resolve
from interp_steer.steering.scale import Scale
from interp_steer.util.files import parse_json

CHAT_TOKENS, TEXT_TOKENS = 256, 16  # of an answer whose length nobody said


class Folder(Mapping[str, Vector]):
    """The directions of one folder, by their names. A name from the network is never a path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: dict[str, tuple[int, Vector]] = {}

    def __getitem__(self, name: str) -> Vector:
        if not is_name(name) or name not in set(self):
            raise KeyError(name)
        file = self.path / f"{name}.safetensors"
        written = file.stat().st_mtime_ns
        if name not in self._read or self._read[name][0] != written:
            self._read[name] = written, load(file).named(name)
        return self._read[name][1]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.stem for path in self.path.glob("*.safetensors")))

    def __len__(self) -> int:
        return len(list(iter(self)))


@dataclass
class Service:
    """A model that answers, and what it may be steered by.

    Attributes:
        name: the model's, as clients ask for it.
        settings: name -> interventions with lengths; `name+setting` is a model of its own.
        scale: the unit of doses, measured once.
    """

    model: SteeringModel
    name: str
    directions: Mapping[str, Vector]
    settings: Mapping[str, tuple[Intervention, ...]]
    scale: Scale
    limits: Limits
    worker: Worker
    began: int = field(default_factory=lambda: int(time.time()))
    answers: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(
        cls,
        model: SteeringModel,
        directions: Mapping[str, Vector],
        settings: Mapping[str, str],
        prompts: Sequence[Given],
        name: str = "",
        limits: Limits | None = None,
    ) -> "Service":
        """Args:
            settings: name -> a line of interventions.
            prompts: whose residual stream is the unit of doses.

        Raises:
            RequestError: a setting that cannot be read or does not fit the model.
        """
        limits = limits or Limits()
        scale = Scale.of(model, [model.encode(prompt) for prompt in prompts])
        read_in = {}
        for key, text in settings.items():
            if not is_name(key) or "+" in key:
                raise RequestError(f"a setting called {key!r}; expected letters, digits, '_', '-'")
            steps = resolve(parse(text, directions), scale)
            for one in steps:
                one.check(model)
            read_in[key] = steps
        called = name or Path(model.name).name
        worker = Worker(model, limits.most, limits.waiting)
        return cls(model, called, directions, read_in, scale, limits, worker)

    @property
    def names(self) -> list[str]:
        """Models that may be asked for."""
        return [self.name, *(f"{self.name}+{setting}" for setting in self.settings)]

    def steering(self, body: Options) -> tuple[Intervention, ...]:
        """What a request is steered by: its field, or its model's name.

        Raises:
            Unknown: no such model.
            RequestError: as `carried` does; a field beside a model that is steered already.
        """
        if body.model not in self.names:
            raise Unknown(f"no model {body.model[:80]!r}{nearest(body.model, self.names)}")
        setting = body.model[len(self.name) + 1 :]
        steps = carried(body.model_extra or {}, self.directions)
        if steps is None:
            return self.settings[setting] if setting else ()
        if setting:
            raise RequestError(
                f"the model {body.model!r} is steered already; ask {self.name!r} and steer it by "
                "the field, or leave the field out"
            )
        return resolve(steps, self.scale)

    def tokens(self, asked: int | None, default: int, prompt: Given) -> int:
        """How long an answer may be."""
        if asked is not None:
            if asked > self.limits.tokens:
                raise RequestError(
                    f"max_tokens is {asked}; this server answers with at most {self.limits.tokens}"
                )
            return max(1, asked)
        room = self.model.n_ctx - len(self.model.encode(prompt).ids)
        return max(1, min(default, self.limits.tokens, room))


class Unknown(RequestError):
    """A model that is not here: 404, as OpenAI has it."""


class Stream:
    """The pieces of some jobs, from the worker's thread to this loop."""

    def __init__(self, service: Service) -> None:
        self._loop, self._worker = asyncio.get_running_loop(), service.worker
        self._queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self.jobs: list[Job] = []

    def add(self, row: Row, stops: tuple[str, ...], top: int | None) -> None:
        """One more row to be answered."""
        number = len(self.jobs)

        def deliver(piece: Piece | Exception) -> None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, piece))

        self.jobs.append(Job(row, deliver, stops, top))

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """(number of the job, piece) as they come; raises what a job ends with."""
        self._worker.submit(self.jobs)
        going = len(self.jobs)
        try:
            while going:
                number, piece = await self._queue.get()
                if isinstance(piece, Exception):
                    raise piece
                going -= piece.finish is not None
                yield number, piece
        finally:  # also where the client has left
            self._worker.cancel(self.jobs)


def create_app(service: Service, token: str | None = None) -> FastAPI:
    """The ASGI app."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.worker.close)

    app = FastAPI(title="interp-steer", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, token=token, limits=service.limits)

    def told(error: Exception) -> JSONResponse:
        status, code = _status(error)
        service.answers[status] += 1
        message = str(error) if status != 500 else "the server failed; its log says how"
        headers = {"Retry-After": "5"} if status in (429, 503) else {}
        return JSONResponse(error_body(message, status, code), status, headers)

    @app.exception_handler(RequestError)
    @app.exception_handler(RunError)
    async def on_error(_: Request, error: Exception) -> JSONResponse:
        return told(error)

    @app.exception_handler(HTTPException)
    async def on_status(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(str(error.detail), error.status_code), error.status_code)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        common = {"object": "model", "created": service.began, "owned_by": "interp-steer"}
        data = [
            {"id": name, **common, "steering": line(service.settings.get(setting, ())) or None}
            for name in service.names
            for setting in [name[len(service.name) + 1 :]]
        ]
        return {"object": "list", "data": data}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        found = [one for one in (await models())["data"] if one["id"] == name]
        if not found:
            raise Unknown(f"no model {name[:80]!r}{nearest(name, service.names)}")
        return dict(found[0])

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        running, waiting = service.worker.load
        lines = [
            f'interp_steer_requests_total{{status="{status}"}} {count}'
            for status, count in sorted(service.answers.items())
        ]
        lines += [
            f"interp_steer_rows_running {running}",
            f"interp_steer_rows_waiting {waiting}",
            f"interp_steer_generated_tokens_total {service.worker.generated}",
        ]
        return PlainTextResponse("\n".join(lines) + "\n")

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        body: Chat = read(Chat, await _json(request))
        asked = body.max_completion_tokens or body.max_tokens
        tokens = service.tokens(asked, CHAT_TOKENS, body.prompt)
        rows = _rows(service, body, [body.prompt], tokens)
        envelope = _envelope("chat.completion", body, rows)
        stream = Stream(service)
        for row in rows:
            stream.add(row, body.stops, body.top)
        if body.stream:
            return await _streamed(service, stream, envelope, body)
        texts, ends = await _whole(request, stream)
        service.answers[200] += 1
        of = service.model.decode_token
        choices = [chat_choice(n, texts[n], end, body.top, of) for n, end in enumerate(ends)]
        return JSONResponse(envelope.whole(choices, ends))

    @app.post("/v1/completions", response_model=None)
    async def complete(request: Request) -> Response:
        body: Completion = read(Completion, await _json(request))
        prompts: list[Given] = [
            one if isinstance(one, str) else service.model.encoded(one) for one in body.prompts
        ]
        tokens = max(service.tokens(body.max_tokens, TEXT_TOKENS, one) for one in prompts)
        rows = _rows(service, body, prompts, tokens)
        envelope = _envelope("text_completion", body, rows)
        stream = Stream(service)
        for row in rows:
            stream.add(row, body.stops, body.logprobs)
        if body.stream:
            return await _streamed(service, stream, envelope, body)
        texts, ends = await _whole(request, stream)
        service.answers[200] += 1
        of, generated = service.model.decode_token, body.max_tokens != 0
        choices = []
        for n, end in enumerate(ends):
            prompt = rows[n].prompt
            before = prompt if isinstance(prompt, str) else service.model.encode(prompt).text
            echoed = before if body.echo else None
            choices.append(text_choice(n, texts[n], end, body.logprobs, of, echoed, generated))
        return JSONResponse(envelope.whole(choices, ends))

    return app


async def _json(request: Request) -> Any:
    try:
        text = (await request.body()).decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError("the body is no UTF-8 text") from None
    return parse_json(text, "the body")


def _rows(service: Service, body: Options, prompts: Sequence[Given], tokens: int) -> list[Row]:
    """A row for every prompt and choice; choices differ in their seeds."""
    steer = service.steering(body)
    seed = secrets.randbits(31) if body.seed is None else body.seed % 2**31
    sampling: Sampling = body.sampling(tokens)
    return [
        Row(prompt, steer, sampling, seed + n) for prompt in prompts for n in range(body.n or 1)
    ]


def _envelope(kind: str, body: Options, rows: Sequence[Row]) -> Envelope:
    return Envelope(kind, body.model, line(rows[0].steer), rows[0].seed)


async def _whole(request: Request, stream: Stream) -> tuple[list[str], list[Piece]]:
    """All texts, and the last piece of each; ends with its client."""
    texts = [""] * len(stream.jobs)
    ends: list[Piece | None] = [None] * len(stream.jobs)

    async def gather() -> None:
        async for number, piece in stream.pieces():
            texts[number] += piece.text
            if piece.finish:
                ends[number] = replace(piece, text="")

    work = asyncio.create_task(gather())
    gone = asyncio.create_task(_left(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise RunError("the client has left")
        work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
    return texts, [end for end in ends if end]


async def _left(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _streamed(
    service: Service, stream: Stream, envelope: Envelope, body: Options
) -> StreamingResponse:
    """Server-sent events, as OpenAI's clients read them; what fails before the first has a status
    of its own.
    """
    pieces = stream.pieces()
    first = await anext(pieces)

    async def events() -> AsyncIterator[str]:
        ends: list[Piece] = []
        try:
            if envelope.chats:
                for number in range(len(stream.jobs)):
                    yield _event(envelope.part(number, "", role="assistant"))
            async for number, piece in _again(first, pieces):
                if piece.text:
                    yield _event(envelope.part(number, piece.text))
                if piece.finish:
                    ends.append(piece)
                    yield _event(envelope.part(number, None, piece.finish))
            if body.usage_wanted:
                yield _event(envelope.end(ends))
            service.answers[200] += 1
            yield "data: [DONE]\n\n"
        except (RequestError, RunError) as error:
            status, code = _status(error)
            service.answers[status] += 1
            yield _event(error_body(str(error), status, code))

    return StreamingResponse(events(), media_type="text/event-stream")


async def _again(
    first: tuple[int, Piece], rest: AsyncGenerator[tuple[int, Piece], None]
) -> AsyncIterator[tuple[int, Piece]]:
    """What was taken already, then the rest; ends the rest when it is left."""
    async with aclosing(rest):
        yield first
        async for one in rest:
            yield one


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _status(error: Exception) -> tuple[int, str | None]:
    """The status of an error, and OpenAI's code for it."""
    if isinstance(error, Unknown):
        return 404, "model_not_found"
    if isinstance(error, RequestError):
        return 400, None
    if isinstance(error, Full):
        return 429, "queue_full"
    if isinstance(error, OutOfMemory):
        return 503, "out_of_memory"
    return 500, None
