"""The page's own routes: labels, directions that are made on the way, a talk, a curve."""

import asyncio
import base64
import binascii
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Result, Row, Sampling
from interp_steer.errors import RequestError, SteerError
from interp_steer.labels.label import named
from interp_steer.prompts.file import QUESTIONS, PromptFile
from interp_steer.prompts.prompt import Given
from interp_steer.serve.body import json_of, read
from interp_steer.serve.carriers import vector_of
from interp_steer.serve.readings import shades
from interp_steer.serve.service import Service
from interp_steer.serve.session import Session, Turn
from interp_steer.serve.streams import Pieces, Stream, streamed
from interp_steer.steering.direction import Direction, members
from interp_steer.steering.grammar import parse
from interp_steer.steering.intervention import Vector, brief, resolve

PAGE = Path(__file__).parent / "page"
TALKS = 64  # that are kept
LINES = 16  # of one curve
WORD_TEXTS = 16  # that a word is read from
FORGOTTEN = "a new conversation: the model does not read what stands above"
KINDS = {"page.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}
# nothing comes from outside, and no other page may frame it
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Text = Annotated[str, Field(max_length=100_000)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class Asked(BaseModel):
    """A request of the page; unlike OpenAI's it has no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Said(Asked):
    """The next line of a talk."""

    session: Name
    text: Annotated[str, Field(min_length=1, max_length=100_000)]
    turns: Annotated[int, Field(ge=0)] = 0  # that the page shows
    line: Text = ""
    shade: Name | None = None
    system: Text | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.5
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.1
    max_tokens: Annotated[int, Field(ge=1)] = 96
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class Wanted(Asked):
    """A direction that is to be made: of a feature, a word or a file."""

    feature: Name | None = None
    word: Name | None = None
    layer: Annotated[int, Field(ge=0, lt=10_000)] | None = None
    file: Name | None = None
    data: str | None = None
    at: Name | None = None
    name: Name | None = None


class Curve(Asked):
    """Lines whose effect on the last unsteered answer of a talk is asked for."""

    session: Name
    lines: Annotated[list[Text], Field(min_length=1, max_length=LINES)]


def router(service: Service) -> APIRouter:
    """The page and its routes."""
    app = APIRouter()
    talks: OrderedDict[str, Session] = OrderedDict()

    @app.get("/", response_model=None)
    async def page() -> Response:
        headers = {"Content-Security-Policy": POLICY, "X-Frame-Options": "DENY"}
        return FileResponse(PAGE / "page.html", headers=headers)

    @app.get("/page/{name}", response_model=None)
    async def part(name: str) -> Response:
        if name not in KINDS:
            raise RequestError(f"no file {name[:80]!r}")
        return FileResponse(PAGE / name, media_type=KINDS[name])

    @app.get("/api/about")
    async def about() -> dict[str, Any]:
        model = service.model
        return {
            "name": service.name,
            "model": Path(model.name).name if Path(model.name).is_absolute() else model.name,
            "layers": model.n_layers,
            "width": model.d_model,
            "chat": model.is_chat,
            "medians": list(service.scale.medians),
            "most_tokens": service.limits.tokens,
            "settings": {key: brief(steps) for key, steps in service.settings.items()},
            "directions": [_shown(service, name) for name in service.directions],
        }

    @app.get("/api/labels")
    async def labels(q: str, limit: int = 20) -> list[dict[str, Any]]:
        return await asyncio.to_thread(_search, q[:200], max(1, min(limit, 50)))

    @app.post("/api/direction")
    async def direction(request: Request) -> dict[str, Any]:
        wanted: Wanted = read(Wanted, await json_of(request))
        made = await _make(service, wanted)
        return _shown(service, service.directions.put(made).name)

    @app.get("/api/direction/{name}", response_model=None)
    async def saved(name: str) -> Response:
        found = service.directions.get(name)
        if found is None:
            raise RequestError(f"unknown direction {name[:80]!r}")
        content = await asyncio.to_thread(_file_of, found)
        headers = {"Content-Disposition": f'attachment; filename="{found.name}.safetensors"'}
        return Response(content, media_type="application/octet-stream", headers=headers)

    @app.post("/api/talk", response_model=None)
    async def talk(request: Request) -> Response:
        said: Said = read(Said, await json_of(request))
        session = _session(service, talks, said)
        session.steer(said.line or "off")
        if said.text.startswith("/save"):
            raise RequestError("save the talk by its button")
        forgotten = service.model.is_chat and said.turns > len(session.said)
        turn = session.command(said.text) if said.text.startswith("/") else session.ask(said.text)
        if isinstance(turn, str):
            return JSONResponse({"told": turn, "line": brief(session.steps)})
        if forgotten:
            turn = replace(turn, notes=(FORGOTTEN, *turn.notes))
        stream, shade = Stream(service), _shade(service, said.shade)
        for row in turn.rows:
            if shade is None:
                stream.add(row)
            else:
                stream.add(row, (), (shade.site,), partial(_shaded, service, shade))
        return await streamed(service, stream, partial(_talked, session, turn))

    @app.get("/api/talk/{name}")
    async def record(name: str) -> dict[str, Any]:
        if name not in talks:
            raise RequestError("nothing was said yet")
        return talks[name].record()

    @app.post("/api/curve")
    async def curve(request: Request) -> list[dict[str, Any]]:
        wanted: Curve = read(Curve, await json_of(request))
        session = talks.get(wanted.session)
        if session is None or not session.said:
            raise RequestError("ask something first: the curve is read on the unsteered answer")
        read_on = session.last
        settings = [resolve(parse(one, service.directions), service.scale) for one in wanted.lines]
        task = service.worker.run(partial(_curve, service, *read_on, settings))
        values = await asyncio.wrap_future(task)
        return [{"line": one, **value} for one, value in zip(wanted.lines, values, strict=True)]

    return app


def _shown(service: Service, name: str) -> dict[str, Any]:
    """What the page shows of a direction; one that cannot be read says why."""
    try:
        vector = service.directions[name]
    except SteerError as error:
        return {"name": name, "error": service.told(error)}
    parts = members(vector)
    middle = parts[len(parts) // 2]
    return {
        "name": name,
        "component": middle.site.component,
        "layer": middle.site.layer,
        "layers": [one.site.layer for one in parts],
        "norm": middle.norm,
        "most": middle.max_activation,
        "made_by": _made_by(name, middle),
        "label": named(middle.source.get("label", ""))[:200],
    }


def _made_by(name: str, one: Direction) -> str:
    """The command that makes a direction, where one line does: of a feature that has an address."""
    address = one.source.get("neuronpedia")
    return f"interp-steer features get {address} --name {name}" if address else ""


def _search(query: str, limit: int) -> list[dict[str, Any]]:
    """Labels of features, best first."""
    from interp_steer.labels.searching import search

    if not query.strip():
        return []
    found = search(query, limit=limit)
    return [
        {
            "id": one.id, "index": one.index, "layer": one.layer, "label": named(one.label)[:300],
            "context": one.label[len(named(one.label)) :][:300],
        }
        for one in found
    ]  # fmt: skip


async def _make(service: Service, wanted: Wanted) -> Vector:
    """The direction that is asked for, which fits the model."""
    asked = [name for name in ("feature", "word", "file") if getattr(wanted, name) is not None]
    if len(asked) != 1:
        raise RequestError("expected one of feature, word and file")
    if wanted.feature is not None:
        made: Vector = await asyncio.to_thread(_feature, wanted.feature)
    elif wanted.word is not None:
        task = service.worker.run(partial(_word, service, wanted.word, wanted.layer))
        made = await asyncio.wrap_future(task)
    else:
        made = await asyncio.to_thread(_file, wanted)
    for one in members(made):
        service.model.check(one.site, len(one.unit))
    return made


def _feature(address: str) -> Direction:
    """A decoder row that is on this machine: nothing is fetched."""
    from interp_steer.features.feature import feature

    if address.count("/") != 2 or address.startswith((".", "/", "~")):
        raise RequestError(f"{address[:80]!r} is no feature; expected model/source/index")
    return feature(address, offline=True)


def _word(service: Service, word: str, layer: int | None) -> Vector:
    """A word's direction by the Jacobian lens, at one layer."""
    from interp_steer.steering.jacobian import word_directions

    model = service.model
    at = model.n_layers // 2 if layer is None else layer
    items = PromptFile.read(QUESTIONS).items(as_chat=model.is_chat)[:WORD_TEXTS]
    rows = [Row(item.prompt, (), Sampling(max_new_tokens=48)) for item in items]
    said = Engine(model).generate(rows)
    texts = [model.encoded((*model.encode(r.row.prompt).ids, *r.token_ids)) for r in said]
    return word_directions(model, [word], texts, layers=[at])[word].directions[at]


def _file(wanted: Wanted) -> Vector:
    """A vector out of a file that was dropped on the page."""
    from interp_steer.export.incoming import SUFFIXES, imported

    suffix = Path(str(wanted.file)).suffix
    if suffix not in SUFFIXES or wanted.data is None:
        raise RequestError(f"{str(wanted.file)[:80]!r}: expected a {', '.join(SUFFIXES)} file")
    try:
        content = base64.b64decode(wanted.data, validate=True)
    except binascii.Error:
        raise RequestError("the file came damaged") from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"vector{suffix}"
        path.write_bytes(content)
        name = wanted.name or Path(str(wanted.file)).stem
        try:
            return imported(path, at=wanted.at, name=name)
        except SteerError as error:
            said = str(error).replace(str(path), str(wanted.file)[:80])
            raise RequestError(said) from None


def _file_of(vector: Vector) -> bytes:
    """A direction's file, to be saved elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        return vector.save(Path(folder) / "direction.safetensors").read_bytes()


def _session(service: Service, talks: OrderedDict[str, Session], said: Said) -> Session:
    """The talk of a page, as it is asked for now."""
    session = talks.get(said.session)
    tokens = min(said.max_tokens, service.limits.tokens)
    sampling = Sampling(said.temperature, 1.0, 0, said.repetition_penalty, tokens)
    if session is None or session.system != said.system:
        session = Session(service.model, service.directions, said.system, scale=service.scale)
    session.sampling, session.seed = sampling, said.seed
    talks[said.session] = session
    talks.move_to_end(said.session)
    while len(talks) > TALKS:
        talks.popitem(last=False)
    return session


def _shade(service: Service, name: str | None) -> Direction | None:
    """The direction whose reading colours the tokens."""
    if name is None:
        return None
    parts = members(vector_of(name, service.directions))
    one = parts[len(parts) // 2]
    return one if one.site.component in ("resid_pre", "resid_post") else None


def _shaded(service: Service, direction: Direction, result: Result) -> Any:
    return shades(service.model, result, direction)


async def _talked(session: Session, turn: Turn, pieces: Pieces) -> AsyncIterator[dict[str, Any]]:
    """The answers of a turn as events; at its end they are part of the talk."""
    yield {
        "titles": turn.titles, "notes": turn.notes, "steer": brief(turn.rows[-1].steer),
        "asked": turn.asked[-1], "turns": len(session.said),
    }  # fmt: skip
    texts = [""] * len(turn.rows)
    async for number, piece in pieces:
        texts[number] += piece.text
        event: dict[str, Any] = {"column": number, "text": piece.text}
        if piece.finish:
            event |= {"finish": piece.finish, "tokens": piece.tokens, "shades": piece.found}
        yield event
    yield {"kept": turn.kept and session.take(turn, texts)}


def _curve(
    service: Service, prompt: Given, said: str, settings: list[Any]
) -> list[dict[str, float]]:
    """Of each line KL(unsteered || steered) on an unsteered answer, nats a token."""
    model, engine = service.model, Engine(service.model)
    answer = model.encode_after(prompt, said)[:64]
    rows = [Row(prompt), *(Row(prompt, steps) for steps in settings)]
    scores = engine.score(rows, [answer] * len(rows), reference=[None, *[0] * len(settings)])
    return [{"kl": float(one.kl.mean())} for one in scores[1:] if one.kl is not None]
