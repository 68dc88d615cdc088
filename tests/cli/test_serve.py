"""The server as a person starts and ends it."""

import os
import re
import signal
import socket
import subprocess
import sys

import httpx

from tests.conftest import error


def test_it_starts_answers_and_ends(tiny_folder, tmp_path):
    """Its names and addresses on stdout; Ctrl-C ends it while a client waits for an answer."""
    ask = {"messages": [{"role": "user", "content": "I love"}], "max_tokens": 4}
    words = [sys.executable, "-m", "interp_steer", "serve", "--model", str(tiny_folder), "--port",
             "0", "--name", "tiny", "--device", "cpu"]  # fmt: skip
    env = {**os.environ, "INTERP_STEER_CACHE": str(tmp_path)}
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as server:
        lines = [server.stdout.readline() for _ in range(3)]
        assert lines[0].split() == ["model", "tiny"]
        address = re.fullmatch(r"page +(http://127\.0\.0\.1:\d+)\n", lines[2])[1]
        assert lines[1] == f"api     {address}/v1\n"
        with httpx.Client(
            base_url=address, timeout=60, transport=httpx.HTTPTransport(retries=5)
        ) as client:
            answer = client.post("/v1/chat/completions", json={"model": "tiny", **ask})
            assert answer.status_code == 200 and answer.json()["choices"]
            assert "interp-steer" in client.get("/").text
        server.send_signal(signal.SIGINT)
        assert server.wait(20) in (0, 130)


def test_a_port_that_is_taken(tiny_folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = error(1, "serve", "--model", tiny_folder, "--port", port, "--directions", tmp_path)
    assert f"port {port}" in told and "--port takes another" in told


def test_the_starters_labels_are_there_at_once(tmp_path, monkeypatch):
    """They come with the package: the page finds them without another command."""
    from interp_steer.cli.serve import _with_labels
    from interp_steer.labels import search

    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path))
    _with_labels()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.db")}
    assert search("paris")[0].index == 2652
    _with_labels()  # they are there already
    assert written and written == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.db")}


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    from interp_steer.cli import serve

    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "fastapi" else 1)
    assert "pip install 'interp-steer[serve]'" in error(2, "serve")
