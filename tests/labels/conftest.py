"""Every test has its own cache and, if it asks, its own Neuronpedia on loopback."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from interp_steer.labels import Client

from .server import Neuronpedia


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this test alone, and no key or address from outside."""
    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path / "cache"))
    for name in ("NEURONPEDIA_URL", "NEURONPEDIA_EXPORTS_URL", "NEURONPEDIA_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Neuronpedia]:
    world = Neuronpedia()
    monkeypatch.setenv("NEURONPEDIA_URL", world.url)
    monkeypatch.setenv("NEURONPEDIA_EXPORTS_URL", world.url)
    yield world
    world.close()


@pytest.fixture
def client(server: Neuronpedia) -> Client:
    """A client that does not spend the test's time on waiting."""
    return Client(timeout=1.0, patience=5.0)
