"""The server as an ASGI app: the gate, the routes, the page.

uvicorn.run(create_app(service))
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from interp_steer.errors import RequestError, RunError
from interp_steer.serve import openai_routes, play
from interp_steer.serve.gate import Gate, error_body
from interp_steer.serve.service import Service
from interp_steer.serve.streams import status


def create_app(service: Service, token: str | None = None) -> FastAPI:
    """The ASGI app."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.worker.close)

    app = FastAPI(title="interp-steer", lifespan=lifespan, openapi_url=None)
    app.add_middleware(Gate, token=token, limits=service.limits)

    @app.exception_handler(RequestError)
    @app.exception_handler(RunError)
    async def on_error(_: Request, error: Exception) -> JSONResponse:
        code, name = status(error)
        service.answers[code] += 1
        headers = {"Retry-After": "5"} if code in (429, 503) else {}
        return JSONResponse(error_body(service.told(error), code, name), code, headers)

    @app.exception_handler(Exception)  # it goes to the log as well
    async def on_fault(_: Request, __: Exception) -> JSONResponse:
        service.answers[500] += 1
        return JSONResponse(error_body("the server failed; its log says how", 500), 500)

    @app.exception_handler(HTTPException)
    async def on_status(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(str(error.detail), error.status_code), error.status_code)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        running, waiting = service.worker.load
        lines = [
            f'interp_steer_requests_total{{status="{code}"}} {count}'
            for code, count in sorted(service.answers.items())
        ]
        lines += [
            f"interp_steer_rows_running {running}",
            f"interp_steer_rows_waiting {waiting}",
            f"interp_steer_generated_tokens_total {service.worker.generated}",
        ]
        return PlainTextResponse("\n".join(lines) + "\n")

    app.include_router(openai_routes.router(service))
    app.include_router(play.router(service))
    return app
