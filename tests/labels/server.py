"""A Neuronpedia on loopback: it keeps the contract that the client relies on, traps included."""

import gzip
import hashlib
import json
import re
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

NOT_FOUND = "The model, source, or feature you specified is not available."
LIMITED = {
    "endpoint": "/api/explanation/search",
    "limitPerWindow": 200,
    "requestWindow": "60 m",
    "remainingRequests": 0,
    "error": "Rate limit exceeded for this endpoint.",
}
HTML = b"<!DOCTYPE html><html><body>Not here</body></html>"


@dataclass
class Reply:
    """What a fault answers instead of the real thing."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    empty: bool = False  # the answer is that there is nothing, not that nothing is changed
    drop: bool = False  # close without a word
    cut: int | None = None  # send this many bytes of the real answer, then close
    pause: float = 0.0  # wait before answering
    drip: float = 0.0  # then a byte each so many seconds


def limited(**headers: str) -> Reply:
    """A 429 as the server sends it: no Retry-After unless some proxy adds one."""
    return Reply(429, json.dumps(LIMITED).encode(), headers)


class Neuronpedia:
    """The API and the bucket of export files behind one address."""

    def __init__(self) -> None:
        self.neurons: dict[tuple[str, str, str], dict] = {}
        self.private: set[tuple[str, str]] = set()
        self.results: dict[str, list[dict | None]] = {}  # by route; None: private, cut out late
        self.files: dict[str, bytes] = {}
        self.max_keys = 1000
        self.list_etags = True
        self.list_sizes = True
        self.count_keys = True
        self.faults: dict[str, deque[Reply]] = {}  # by the beginning of the path
        self.always: dict[str, Reply] = {}
        self.delay = 0.0
        self.remaining: int | None = None
        self.log: list[tuple[str, str, dict[str, str], object]] = []
        self.sent = 0
        world = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None: ...

            def do_GET(self) -> None:
                world.answer(self, None)

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                world.answer(self, json.loads(raw))

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *args: object) -> None: ...  # clients that we drop complain

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def asked(self, start: str = "") -> list[str]:
        """The paths asked for so far."""
        return [path for _, path, *_ in self.log if path.startswith(start)]

    def fault(self, start: str, *replies: Reply) -> None:
        """The next requests under a path get these answers."""
        self.faults[start] = deque(replies)

    # -- answering -------------------------------------------------------------------------------

    def answer(self, at: BaseHTTPRequestHandler, body: object) -> None:
        self.log.append((at.command, at.path, dict(at.headers), body))
        time.sleep(self.delay)
        fault = next((r for start, r in self.always.items() if at.path.startswith(start)), None)
        for start, replies in self.faults.items():
            if at.path.startswith(start) and replies:
                fault = replies.popleft()
        if fault and fault.pause:
            time.sleep(fault.pause)
        if fault and fault.drop:
            at.close_connection = True
            return
        if (
            fault
            and fault.cut is None
            and not fault.drip
            and (fault.status != 200 or fault.body or fault.empty)
        ):
            return self.send(at, fault.status, fault.body, fault.headers)
        parts = urlsplit(at.path)
        if parts.path.startswith("/api/"):
            status, data = self.api(at.command, unquote(parts.path), body)
            raw = data if isinstance(data, bytes) else json.dumps(data).encode()
            headers = {"Content-Type": "application/json"}
            if self.remaining is not None:
                headers["x-limit-remaining"] = str(self.remaining)
        elif parts.query:
            status, raw, headers = 200, self.listing(parse_qs(parts.query)), {}
        else:
            status, raw, headers = self.file(unquote(parts.path[1:]), at.headers)
        self.send(at, status, raw, headers, fault)

    def send(
        self,
        at: BaseHTTPRequestHandler,
        status: int,
        raw: bytes,
        headers: dict[str, str],
        fault: Reply | None = None,
    ) -> None:
        at.send_response(status)
        for name, value in headers.items():
            at.send_header(name, value)
        at.send_header("Content-Length", str(len(raw)))
        at.end_headers()
        if fault and fault.drip:
            for byte in raw:
                at.wfile.write(bytes([byte]))
                at.wfile.flush()
                time.sleep(fault.drip)
        elif fault and fault.cut is not None:
            at.wfile.write(raw[: fault.cut])
            at.wfile.flush()
            at.connection.shutdown(2)
            at.close_connection = True
        else:
            at.wfile.write(raw)
        self.sent += len(raw)

    def api(self, method: str, path: str, body: object) -> tuple[int, object]:
        if path.startswith("/api/feature/"):
            model, source, index = path.split("/")[3:6]
            if (model, source, index) in self.neurons:
                return 200, self.neurons[model, source, index]
            known = any(key[:2] == (model, source) for key in self.neurons)
            return 404, {"error": NOT_FOUND} | ({} if known else {"message": NOT_FOUND})
        if path == "/api/features":
            assert isinstance(body, list)
            if not body:
                return 500, {"message": "Unknown Error"}
            keys = {(each["modelId"], each["layer"], str(each["index"])) for each in body}
            found = [self.neurons[key] for key in keys if key in self.neurons]
            return 200, sorted(found, key=lambda n: int(n["index"]))
        if path.startswith("/api/source-set/"):
            model, kind = path.split("/")[3:5]
            names = {s for m, s, _ in self.neurons if m == model and s.partition("-")[2] == kind}
            return 200, {"sources": [{"id": name} for name in sorted(names)]} if names else None
        if path == "/api/model/get":
            assert isinstance(body, dict)
            known = any(model == body["id"] for model, *_ in self.neurons)
            return 200, {"id": body["id"]} if known else None
        if path.startswith("/api/explanation/search"):
            assert isinstance(body, dict)
            route = path.rsplit("/", 1)[1]
            if len(body["query"]) < 3:
                return 400, {"message": "query must be at least 3 characters"}
            if route == "search" and not all(
                any((body["modelId"], layer) == key[:2] for key in self.neurons)
                for layer in body["layers"]
            ):
                return 500, {"message": "Unknown Error"}
            start = body.get("offset", 0)
            page = self.results.get(route, [])[start : start + 20]
            shown = [row for row in page if row is not None]
            answer = {
                "request": body,
                "results": shown,
                "resultsCount": len(shown),
                "hasMore": len(shown) == 20,
            }
            return 200, answer | ({"nextOffset": start + 20} if len(shown) == 20 else {})
        return 404, HTML

    # -- the bucket ------------------------------------------------------------------------------

    def put(self, key: str, rows: list[dict] | bytes, *, pack: bool = True) -> None:
        """Puts a file of rows into the bucket."""
        if isinstance(rows, list):
            rows = "".join(json.dumps(row) + "\n" for row in rows).encode()
            rows = gzip.compress(rows, 1, mtime=0) if pack else rows
        self.files[key] = rows

    def etag(self, key: str) -> str:
        return f'"{hashlib.md5(self.files[key]).hexdigest()}"'

    def listing(self, query: dict[str, list[str]]) -> bytes:
        prefix = query["prefix"][0]
        keys = sorted(key for key in self.files if key.startswith(prefix))  # by text, as S3 does
        start = int(query.get("continuation-token", ["0"])[0])
        page, rest = keys[start : start + self.max_keys], keys[start + self.max_keys :]
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key>"
            + (f"<ETag>{escape(self.etag(key))}</ETag>" if self.list_etags else "")
            + (f"<Size>{len(self.files[key])}</Size>" if self.list_sizes else "")
            + "</Contents>"
            for key in page
        )
        more = (
            f"<NextContinuationToken>{start + self.max_keys}</NextContinuationToken>"
            if rest
            else ""
        )
        count = f"<KeyCount>{len(page)}</KeyCount>" if self.count_keys else ""
        return (
            '<?xml version="1.0"?><ListBucketResult '
            'xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"{count}<IsTruncated>{str(bool(rest)).lower()}</IsTruncated>{entries}{more}"
            "</ListBucketResult>"
        ).encode()

    def file(self, key: str, headers: object) -> tuple[int, bytes, dict[str, str]]:
        if key not in self.files:
            return 404, b"<Error><Code>NoSuchKey</Code></Error>", {}
        raw, etag = self.files[key], self.etag(key)
        get = headers.get  # type: ignore[attr-defined]
        if get("If-None-Match") == etag:
            return 304, b"", {"ETag": etag}
        if (span := get("Range")) and get("If-Range") == etag:
            start = int(re.findall(r"\d+", span)[0])
            told = f"bytes {start}-{len(raw) - 1}/{len(raw)}"
            return 206, raw[start:], {"ETag": etag, "Content-Range": told}
        return 200, raw, {"ETag": etag}


def neuron(model: str, source: str, index: int, *explanations: dict, **more: object) -> dict:
    """A feature as the API gives it."""
    return {
        "modelId": model,
        "layer": source,
        "index": str(index),
        "maxActApprox": 6.5,
        "frac_nonzero": 0.0073,
        "explanations": list(explanations),
        "activations": [],
        **more,
    }


def explanation(uid: str, text: str, **more: object) -> dict:
    """An explanation inside a feature."""
    return {
        "id": uid,
        "description": text,
        "explanationModelName": "gemini-2.0-flash",
        "typeName": "np_max-act-logits",
        "scores": [],
        **more,
    }


def exported(source: str, index: int, text: str, dialect: int = 2, **more: object) -> dict:
    """A row of an export file, in one of its three dialects."""
    model, _, layer = source.partition("/")
    row: dict[str, object] = {
        "id": f"e{layer[:2]}x{index}",
        "modelId": model,
        "layer": layer,
        "index": str(index),
        "authorId": "a",
        "description": text,
        "typeName": "np_max-act-logits",
        "explanationModelName": "gemini-2.0-flash",
    }
    if dialect == 1:
        row |= {"embedding": "[0.1,0.2]", "umap_x": None, "umap_cluster": None}
    elif dialect == 2:
        row |= {"embedding": [0.1, 0.2], "triggeredById": "b", "notes": None, "createdAt": "2025"}
    else:
        row |= {"embedding": None, "typeName": "unknown", "explanationModelName": "unknown"}
    return row | more
