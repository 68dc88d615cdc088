"""Caches of a test's own, for tests that fetch features."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from interp_steer.features import hub
from interp_steer.labels import registry


@pytest.fixture(scope="session")
def kept_registry(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The registry's file in the cache: reading SAELens's own takes a second, so once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERP_STEER_CACHE", str(tmp_path_factory.mktemp("kept")))
        registry._releases.cache_clear()
        assert registry.releases()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_registry: None) -> Path:
    """Our cache and the hub's, of this test alone; and no pauses between tries."""
    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "PAUSE", 0.01)
    return tmp_path / "cache"
