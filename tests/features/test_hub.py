import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from interp_steer.errors import RunError
from interp_steer.features import hub
from interp_steer.features.feature import feature
from interp_steer.labels import registry
from tests.features.test_decoder import big
from tests.features.test_feature import (
    ANDY,
    COMMIT,
    OLD,
    SCOPE,
    assert_exact,
    put_scope,
    random,
)

pytestmark = pytest.mark.usefixtures("cache")


class Hub:
    """The hub on loopback: serves the files of a folder, and may misbehave."""

    def __init__(self, root: Path) -> None:
        self.root, self.mode, self.sent, self.elsewhere = root, "", 0, ""
        self.log: list[tuple[str, str | None, str | None]] = []  # path, Range, Authorization
        world = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                asked = self.headers.get("Range")
                world.log.append((self.path, asked, self.headers.get("Authorization")))
                path = world.root / self.path.split("/resolve/main/")[-1].lstrip("/")
                if world.mode == "busy":
                    world.mode = ""
                    return self.head(503)
                if world.mode in ("401", "404", "500"):
                    return self.head(int(world.mode))
                if not path.is_file():
                    return self.head(404)
                if world.elsewhere and path.suffix == ".safetensors":
                    return self.head(302, Location=f"{world.elsewhere}/{path.name}")
                size = path.stat().st_size
                first, last = 0, size - 1
                if asked and world.mode != "ignores":
                    ends = asked.removeprefix("bytes=").split("-")
                    first, last = int(ends[0]), min(int(ends[1] or last), last)
                    told = f"bytes {first}-{last}/{size}"
                    if world.mode == "other part":
                        told = f"bytes {first + 1}-{last + 1}/{size}"
                    self.head(206, last - first + 1, {"Content-Range": told})
                else:
                    self.head(200, size)
                if body:
                    self.body(path, first, last - first + 1)

            def head(self, status, length=0, more=None, **headers) -> None:
                self.send_response(status)
                etag = f'"{hashlib.sha256(self.path.encode()).hexdigest()}"'  # one for each file
                common = {"ETag": etag, "X-Repo-Commit": COMMIT, "Content-Length": str(length)}
                if status == 404:
                    common["X-Error-Code"] = "EntryNotFound"
                for name, value in {**common, **(more or {}), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()

            def body(self, path: Path, first: int, count: int) -> None:
                cut = count // 2 if world.mode == "cuts" and path.suffix != ".json" else count
                with path.open("rb") as file:
                    file.seek(first)
                    while cut > 0:
                        data = file.read(min(cut, 1 << 16))
                        try:
                            self.wfile.write(data)
                        except OSError:  # the client has had enough
                            self.close_connection = True
                            return
                        world.sent += len(data)
                        cut -= len(data)
                if world.mode == "cuts":
                    self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT does as huggingface_hub is imported."""
    pattern = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + pattern)


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    world = Hub(tmp_path / "served")
    endpoint(monkeypatch, world.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    yield world
    world.close()


def served(world: Hub, rows: int = 16384, columns: int = 768) -> torch.Tensor:
    """A 50 MB SAE on the hub; its row 9999."""
    entry = registry.entry(*OLD)
    home = world.root / entry.path
    home.mkdir(parents=True, exist_ok=True)
    (home / "cfg.json").write_text(json.dumps({"hook_point": "blocks.8.hook_resid_pre"}))
    start = big(home / "sae_weights.safetensors", rows, columns)
    row = random(columns, seed=7)
    with (home / "sae_weights.safetensors").open("r+b") as file:
        file.seek(start + 9999 * columns * 4)
        file.write(row.numpy().tobytes())
    return row


def test_a_row_on_the_hub_costs_a_few_kilobytes(online):
    want = served(online)
    got = feature(*OLD, 9999)
    assert_exact(got, want)
    assert online.sent < 20_000, online.sent
    assert got.source["revision"] == COMMIT
    asked = len(online.log)
    assert feature(*OLD, 9999) == got and len(online.log) == asked
    online.mode = "404"
    with pytest.raises(RunError, match=r"cannot read a part of .*: there is no such file"):
        feature(*OLD, 9998)


def test_a_small_file_and_a_long_header_come_whole(online):
    served(online, rows=10_000, columns=4)
    assert feature(*OLD, 9999).norm > 0
    home = online.root / registry.entry(*OLD).path
    many = {f"b{i:04}": torch.zeros(1) for i in range(500)}
    save_file({**many, "W_dec": random(3, 4)}, home / "sae_weights.safetensors")
    assert_exact(feature(*OLD, 1), random(3, 4)[1])


def test_a_passing_fault_is_tried_again(online):
    want = served(online)
    feature(*OLD, 9999)
    (Path(constants.HF_HUB_CACHE).parent / "cache").rename(online.root / "away")
    online.mode = "busy"
    assert_exact(feature(*OLD, 9999), want)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("ignores", "the server ignores Range and sends the whole file"),
        ("cuts", r"\(3 tries\)"),
        ("500", r"status 500 \(3 tries\)"),
        ("other part", "another part than was asked for"),
        ("401", "no permission; accept its terms on the hub and set HF_TOKEN"),
        ("404", "there is no such file"),
    ],
)
def test_servers_that_misbehave_are_one_line(mode, said, online):
    served(online)
    hub.Repo(registry.entry(*OLD).repo).path(f"{registry.entry(*OLD).path}/cfg.json")
    online.mode, online.sent = mode, 0
    with pytest.raises(RunError, match=rf"^cannot read a part of jbloom/.*: .*{said}") as error:
        feature(*OLD, 9999)
    assert "\n" not in str(error.value) and "hf_secret" not in str(error.value)
    assert online.sent < 8_000_000  # what the socket had taken before it was closed


def test_no_server_is_one_line(online, monkeypatch):
    served(online)
    hub.Repo(registry.entry(*OLD).repo).path(f"{registry.entry(*OLD).path}/cfg.json")
    endpoint(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(RunError, match=r"the connection broke off \(3 tries\)"):
        feature(*OLD, 9999)


def test_the_token_stays_with_the_hub(online):
    want = served(online)
    other = Hub(online.root / registry.entry(*OLD).path)
    online.elsewhere = other.url
    try:
        assert_exact(feature(*OLD, 9999), want)
        assert {seen for path, _, seen in online.log if path.endswith(".safetensors")} == {
            "Bearer hf_secret"
        }
        assert other.log and all(seen is None for _, _, seen in other.log)
        assert all(asked for _, asked, _ in other.log)
        assert other.sent < 20_000
    finally:
        other.close()


def test_a_column_layout_is_downloaded_whole_and_kept(online):
    file = put_scope()
    home = online.root / registry.entry(*SCOPE).path
    home.parent.mkdir(parents=True, exist_ok=True)
    file.parents[1].rename(home)  # off this machine, onto the hub
    got = feature(*SCOPE, 5)
    asked = len(online.log)
    assert asked and feature(*SCOPE, 6, offline=True) != got
    assert len(online.log) == asked
    assert got.source["revision"] == COMMIT
    online.mode = "404"
    with pytest.raises(RunError, match=r"cannot fetch .*: there is no such file"):
        feature(*ANDY, 1)
