"""`interp-steer serve`: an OpenAI-compatible server, each request steered as it asks."""

import os
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from interp_steer.cli import common
from interp_steer.errors import RequestError, RunError
from interp_steer.labels.registry import STARTER
from interp_steer.util.console import progress

TOKEN = "INTERP_STEER_TOKEN"


def serve(
    model: common.Model = "starter",
    named: Annotated[
        list[str] | None,
        common.opt(
            'A steered model of its own: --as "eiffel=add(eiffel, 0.5 dose) at 13" is '
            "'MODEL+eiffel'. May be repeated.",
            "--as",
            metavar="NAME=LINE",
        ),
    ] = None,
    directions: Annotated[
        Path | None,
        common.opt("Folder of directions that requests name; by default the stored ones."),
    ] = None,
    host: Annotated[
        str, common.opt(f"Address. Another than this machine's needs a token in {TOKEN}.")
    ] = "127.0.0.1",
    port: Annotated[int, common.opt("Port.", min=0, max=65535)] = 8000,
    name: Annotated[str, common.opt("The model's name for clients; by default its own.")] = "",
    max_tokens: Annotated[int, common.opt("Most tokens of an answer.", min=1)] = 2048,
    most: Annotated[int, common.opt("Answers that are computed at once.", min=1)] = 64,
    waiting: Annotated[int, common.opt("Answers that may wait for a place.", min=0)] = 256,
    max_body: Annotated[int, common.opt("Most bytes of a request.", min=1024)] = 2**20,
    prompts: Annotated[
        Path | None,
        common.opt("File of prompts whose residual stream is the unit of dose. 16 come along."),
    ] = None,
    dtype: common.Dtype = None,
    device: common.Device = None,
    date: common.Date = None,
) -> None:
    """Serve the model to OpenAI's clients, each request steered as it asks.

    A request is steered by its field `steering`, such as "add(NAME, 0.5 dose) at 13", or by the
    name of a model that --as made. Requests with different steering share one batch.
    """
    if not all(find_spec(name) for name in ("fastapi", "uvicorn")):
        raise RequestError("the server needs an extra: pip install 'interp-steer[serve]'")
    import uvicorn

    from interp_steer.serve.gate import Limits, is_loopback

    token = os.environ.get(TOKEN) or None
    if token is None and not is_loopback(host):
        raise RequestError(
            f"--host {host} lets other machines ask: set a secret in {TOKEN}, which clients send "
            "as their API key"
        )
    with progress("starting", every=5):
        from interp_steer.prompts.file import QUESTIONS, PromptFile
        from interp_steer.serve.app import create_app
        from interp_steer.serve.service import Service, Shelf
        from interp_steer.steering.grammar import parse
        from interp_steer.util.files import cache_dir

    folder = directions or cache_dir("directions")
    if not folder.is_dir():
        raise RequestError(f"--directions {folder} is no folder")
    known = Shelf(folder)
    settings: dict[str, str] = {}
    for entry in named or []:
        key, sign, line = entry.partition("=")
        if not sign or not line.strip() or key in settings:
            raise RequestError(f"--as {entry!r}: expected NAME=LINE, each name once")
        settings[key.strip()] = line
    common.check_fits(model, [parse(line, known) for line in settings.values()])
    file = PromptFile.read(prompts or QUESTIONS)
    place = _bound(host, port)
    loaded = common.load(model, dtype, device, date=date)
    if model == STARTER:
        _with_labels()
    asked = [item.prompt for item in file.items(as_chat=loaded.is_chat)]
    limits = Limits(body=max_body, tokens=max_tokens, most=most, waiting=waiting)
    service = Service.of(loaded, known, settings, asked, name, limits)
    for one in service.models:
        print(f"model   {one}")
    where = f"http://{f'[{host}]' if ':' in host else host}:{place.getsockname()[1]}"
    print(f"api     {where}/v1\npage    {where}", flush=True)
    app = create_app(service, token)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[place])


def _with_labels() -> None:
    """The starter's labels, which come with the package, so that the page can search them."""
    from interp_steer.labels import coverage, import_files

    try:
        there = any(one.labels for one in coverage([STARTER]))
    except RunError:  # nothing is stored yet
        there = False
    if not there:
        import_files([STARTER])


def _bound(host: str, port: int) -> socket.socket:
    """The address, taken before the model is loaded."""
    try:
        kind = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=kind)
    except OSError as error:
        raise RunError(
            f"cannot listen at {host} port {port}: {error.strerror or error}; --port takes another"
        ) from None
