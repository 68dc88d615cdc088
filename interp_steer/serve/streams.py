"""Pieces of text from the worker's thread to the server's loop, and on to a client."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from interp_steer.engine.row import Result, Row
from interp_steer.errors import RequestError, RunError
from interp_steer.model.site import Site
from interp_steer.serve.gate import error_body
from interp_steer.serve.service import Service, Unknown
from interp_steer.serve.worker import Full, Job, OutOfMemory, Piece

Pieces = AsyncGenerator[tuple[int, Piece], None]
"""(number of the job, piece) as they come."""


class Stream:
    """The pieces of some jobs, from the worker's thread to this loop."""

    def __init__(self, service: Service) -> None:
        self._loop, self._worker = asyncio.get_running_loop(), service.worker
        self._queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self.jobs: list[Job] = []

    def add(
        self,
        row: Row,
        stops: tuple[str, ...] = (),
        taps: tuple[Site, ...] = (),
        read: Callable[[Result], Any] | None = None,
    ) -> None:
        """One more row to be answered; see `Job`."""
        number = len(self.jobs)

        def deliver(piece: Piece | Exception) -> None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, piece))

        self.jobs.append(Job(row, deliver, stops, taps, read))

    async def pieces(self) -> Pieces:
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


async def whole(request: Request, stream: Stream) -> tuple[list[str], list[Piece]]:
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


async def streamed(
    service: Service, stream: Stream, events: Callable[[Pieces], AsyncIterator[dict[str, Any]]]
) -> StreamingResponse:
    """Server-sent events of some jobs; what fails before the first has a status of its own.

    Args:
        events: makes events of pieces.
    """
    pieces = stream.pieces()
    first = await anext(pieces)

    async def lines() -> AsyncIterator[str]:
        try:
            async with aclosing(_again(first, pieces)) as some:
                async for content in events(some):
                    yield _event(content)
            service.answers[200] += 1
            yield "data: [DONE]\n\n"
        except (RequestError, RunError) as error:
            code, name = status(error)
            service.answers[code] += 1
            yield _event(error_body(service.told(error), code, name))

    return StreamingResponse(lines(), media_type="text/event-stream")


async def _again(first: tuple[int, Piece], rest: Pieces) -> Pieces:
    """What was taken already, then the rest; ends the rest when it is left."""
    async with aclosing(rest):
        yield first
        async for one in rest:
            yield one


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def status(error: Exception) -> tuple[int, str | None]:
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
