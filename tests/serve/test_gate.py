"""Who may ask, bodies of any kind, and clients that are slow or leave."""

import json
import re
import socket
import time

import httpx
import pytest

from interp_steer.serve.gate import Limits, is_loopback
from interp_steer.serve.service import Service, Shelf
from tests.serve.conftest import PROMPTS, listening

BODY = {"model": "tiny", "prompt": "The quick", "max_tokens": 4, "temperature": 0}


def raw(address, data, wait=3.0):
    """What comes back for these very bytes."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as line:
        line.sendall(data)
        parts = []
        try:
            while part := line.recv(65536):
                parts.append(part)
        except TimeoutError:
            pass
        return b"".join(parts).decode()


@pytest.mark.parametrize(("content", "kind", "status", "said"), [
    (b"", "application/json", 400, "no valid|not valid JSON"),
    (b"{", "application/json", 400, "not valid JSON"),
    (b"[1]", "application/json", 400, "no JSON object"),
    (b"\xff\xfe", "application/json", 400, "no UTF-8"),
    (b'{"a":' * 100_0 + b"1", "application/json", 400, "nested more than"),
    (b'{"model": "tiny", "model": "tiny"}', "application/json", 400, "there twice"),
    (json.dumps(BODY).encode(), "text/plain", 415, "expected application/json"),
    (json.dumps({**BODY, "prompt": "a" * 200_000}).encode(), "application/json", 413, "too large"),
])  # fmt: skip
def test_bodies_of_any_kind(address, content, kind, status, said):
    answer = httpx.post(
        f"{address}/v1/completions", content=content, headers={"Content-Type": kind}, timeout=20
    )
    assert answer.status_code == status, answer.text
    assert re.search(said, answer.json()["error"]["message"])
    assert httpx.post(f"{address}/v1/completions", json=BODY, timeout=20).status_code == 200


def test_a_body_without_an_end(address):
    """One that grows beyond the limit in pieces, and one that never comes."""
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    pieces = "".join(f"{5000:x}\r\n{'a' * 5000}\r\n" for _ in range(30))
    answer = raw(address, f"{head}Transfer-Encoding: chunked\r\n\r\n{pieces}".encode())
    assert " 413 " in answer.splitlines()[0]
    start = time.monotonic()
    answer = raw(address, f"{head}Content-Length: 50\r\n\r\n{{".encode(), wait=10)
    assert " 408 " in answer.splitlines()[0] and time.monotonic() - start < 5


def test_unknown_routes_and_methods(address):
    for method, path, status in (("GET", "/v1/completions", 405), ("GET", "/nothing", 404),
                                 ("GET", "/../../etc/passwd", 404),
                                 ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404)):  # fmt: skip
        answer = httpx.request(method, f"{address}{path}")
        assert answer.status_code == status and "message" in answer.json()["error"]


def test_only_this_machine_may_ask_without_a_token(address):
    """Another name that was bound to this address, and a page from elsewhere."""
    for headers in ({"Host": "evil.example"}, {"Host": "evil.example:8000"}, {"Host": ""},
                    {"Origin": "https://evil.example"}):  # fmt: skip
        answer = httpx.get(f"{address}/v1/models", headers=headers)
        assert answer.status_code in (400, 403), headers
    for headers in ({"Host": "localhost"}, {"Host": "[::1]:8000"}, {"Host": "127.0.0.1"},
                    {"Origin": "http://localhost:8000"}):  # fmt: skip
        assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 200
    assert is_loopback("127.3.2.1") and not is_loopback("0.0.0.0") and not is_loopback("::")


def test_a_token_is_asked_for(tiny, folder):
    service = Service.of(tiny, Shelf(folder), {}, PROMPTS, "tiny", Limits())
    with listening(service, "secret") as address:
        assert httpx.get(f"{address}/health").status_code == 200
        for path in ("/", "/page/page.js"):
            assert httpx.get(address + path).status_code == 200
        for path in ("/v1/models", "/api/about", "/metrics", "/page/../v1/models"):
            assert httpx.get(address + path).status_code == 401
        for wrong in ("Bearer wrong", "secret", "Bearer secret1", "Bearer é", "bearer secret"):
            headers = {"Authorization": wrong.encode("latin-1")}
            assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 401, wrong
        right = {"Authorization": "Bearer secret", "Host": "model.example"}
        assert httpx.get(f"{address}/v1/models", headers=right).status_code == 200


def test_a_client_that_leaves_frees_its_row(service, address):
    """In mid-stream, and before a whole answer has come."""
    body = {**BODY, "max_tokens": 400, "temperature": 1, "seed": 3, "prompt": "The tower"}
    with httpx.stream("POST", f"{address}/v1/completions", json={**body, "stream": True}) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/completions", json={**body, "n": 8}, timeout=0.2)
    until = time.monotonic() + 10
    while service.worker.load != (0, 0) and time.monotonic() < until:
        time.sleep(0.05)
    assert service.worker.load == (0, 0)
    assert httpx.post(f"{address}/v1/completions", json=BODY, timeout=20).status_code == 200
    told = httpx.get(f"{address}/metrics").text
    assert 'requests_total{status="200"}' in told and "rows_running 0" in told
