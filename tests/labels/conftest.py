"""Every test has its own cache and, if it asks, its own Neuronpedia on loopback."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from interp_steer.labels import Client, registry

from .server import Neuronpedia


@pytest.fixture(scope="session")
def kept_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SAELens's registry as the cache keeps it: reading it takes a second, so it is read once."""
    folder = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERP_STEER_CACHE", str(folder))
        registry._releases.cache_clear()
        assert registry._releases()
    return next((folder / "registry").iterdir())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_registry: Path) -> Path:
    """The cache of this test alone, and no key or address from outside."""
    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "registry").mkdir(parents=True)
    shutil.copy(kept_registry, tmp_path / "cache" / "registry")
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
    """A client that does not spend the test's time on waiting between its tries."""
    return Client(timeout=1.0, patience=5.0, sleep=lambda seconds: time.sleep(seconds / 20))
