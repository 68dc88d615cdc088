"""A server on loopback with the tiny model, as a client sees it."""

import json
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import uvicorn

from interp_steer.model.model import SteeringModel
from interp_steer.serve.app import create_app
from interp_steer.serve.gate import Limits
from interp_steer.serve.service import Service, Shelf
from interp_steer.steering.direction import Direction
from tests.conftest import make_llama

PROMPTS = ["The quick brown fox", "What is the tallest mountain?"]


@contextmanager
def listening(service, token=None):
    """The address of a running server."""
    server = uvicorn.Server(uvicorn.Config(create_app(service, token), log_level="warning"))
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        place.listen(128)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two stored directions."""
    path, draw = tmp_path_factory.mktemp("directions"), np.random.default_rng(7)
    for name in ("joy", "sad"):
        vector = draw.normal(size=64) * 3
        Direction.of(vector, "blocks.2.hook_resid_post", name).save(path / f"{name}.safetensors")
    return path


@pytest.fixture(scope="session")
def service(tiny, folder):
    settings = {"happy": "add(joy, 6) at 2", "most": "add(joy, 0.9 dose) at 3"}
    limits = Limits(body=100_000, patience=1.0, tokens=400, most=32, waiting=64)
    return Service.of(tiny, Shelf(folder), settings, PROMPTS, "tiny", limits)


@pytest.fixture(scope="session")
def address(service):
    with listening(service) as found:
        yield found


@pytest.fixture
def ask(address):
    """Posts to a route; gives the body, or the error's message beside an unexpected status."""
    with httpx.Client(base_url=address, timeout=60) as client:

        def post(route, body, status=200, **more):
            answer = client.post(f"/v1/{route}", json=body, **more)
            assert answer.status_code == status, answer.text
            return answer.json() if status == 200 else answer.json()["error"]["message"]

        yield post


@pytest.fixture(scope="session")
def without_template(tmp_path_factory):
    """The tiny model as a base model comes."""
    folder = make_llama(tmp_path_factory.mktemp("base") / "base")
    for file in folder.glob("chat_template*"):
        file.unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = SteeringModel.load(folder, device="cpu")
    assert not model.is_chat
    return model
