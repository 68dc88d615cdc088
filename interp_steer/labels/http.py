"""Requests that keep a server's rules: bounded retries, time limits, redirects and rate limits.

Every failure is one typed error; a body is either whole or not there.
"""

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from interp_steer.errors import RequestError, RunError
from interp_steer.util.packed import inflate

_PASSING = frozenset({500, 502, 503, 504})  # worth another try
LIMITS = {"search": 200, "api": 25_000}  # requests an hour; the four searches share one count
LARGEST = 2**27  # bytes of an answer, unless the caller knows its size
_SLOWEST = 1000  # bytes a second; slower than that is a connection that hangs


class NotFound(RequestError):
    """The server does not have what was asked for."""


class Unreachable(RunError):
    """No whole answer came, after a bounded number of tries."""


class BadAnswer(RunError):
    """An answer came that is not what the server's contract says."""


class RateLimited(RunError):
    """The server's limit is used up: `limit` requests per `window` seconds, until `reset`."""

    def __init__(self, endpoint: str, limit: int | None, window: float, reset: datetime) -> None:
        self.endpoint, self.limit, self.window, self.reset = endpoint, limit, window, reset
        told = f"{limit} requests per {window / 60:g} minutes" if limit else "the server's limit"
        super().__init__(
            f"{endpoint}: {told} used up; try again after {reset:%H:%M:%S} UTC "
            "(it then comes back little by little), or pass wait=True (--wait) to sit it out"
        )


class Clock:
    """How long a server may go on failing: the time since something last went well."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.good()

    def good(self) -> None:
        """Something went well: patience starts anew."""
        self._last = time.monotonic()

    def stop(self) -> None:
        """Patience ends now."""
        self._last = float("-inf")

    @property
    def left(self) -> float:
        """Seconds until patience runs out."""
        return self._last + self.patience - time.monotonic()


class _Broken(Exception):
    """A try that brought no whole answer, and why."""


class _Part:
    """What has arrived of a body that broke off, and how long the body may be."""

    data = b""
    etag = ""

    def __init__(self, most: int) -> None:
        self.most = most


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON.

        Raises:
            BadAnswer: it is empty, an HTML page, or damaged.
        """
        try:
            return json.loads(inflate(self.body))
        except (ValueError, RecursionError) as error:
            raise BadAnswer(
                f"{self.url}: expected JSON, got {self._kind()} (status {self.status})"
            ) from error

    @property
    def said(self) -> str:
        """What the server gives as the reason: its `message`, else `error`, else its text."""
        try:
            data = json.loads(inflate(self.body))
        except (ValueError, RecursionError):
            return self._kind()
        if isinstance(data, dict):
            for name in ("message", "error"):
                if isinstance(data.get(name), str):
                    return str(data[name])
        return str(data)[:200]

    def _kind(self) -> str:
        text = self.body[:300].decode("utf-8", "replace").strip()
        if not text:
            return "nothing"
        if code := re.search(r"<Code>(\w+)</Code>", text):  # how the bucket says it
            return code[1]
        return "a page of HTML or XML" if text.startswith("<") else f"{text[:80]!r}"


class Transport:
    """One session; safe to use from several threads.

    Args:
        key: sent as a header to the host of `key_url` and to no other.
        header, scheme: the header's name, and what stands before the key in it.
        offline: refuse every request before a socket is opened.
        wait: sleep until a rate limit ends, and slow down before it is reached.
        timeout: seconds to connect, and between two pieces of an answer.
        sleep: what waiting is, for tests.
    """

    def __init__(
        self,
        key: str | None,
        key_url: str,
        *,
        offline: bool = False,
        wait: bool = False,
        timeout: float = 10.0,
        workers: int = 8,
        header: str = "x-api-key",
        scheme: str = "",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._key, self._key_origin = key, _origin(key_url)
        self._header, self._scheme = header, scheme
        self.offline, self.wait, self.timeout = offline, wait, timeout
        self._sleep = sleep
        self._session = requests.Session()
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=workers + 1)
        self._session.mount("https://", adapter)
        self._session.mount("http://", adapter)
        self._blocked: dict[str, RateLimited] = {}  # by bucket, while the server would refuse
        self._due: dict[str, float] = {}  # by bucket, when the next request is welcome

    def send(
        self,
        method: str,
        url: str,
        *,
        clock: Clock,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        tries: int = 4,
        bucket: str = "",
        most: int = LARGEST,
    ) -> Answer:
        """One answer, whatever its status, once the tries for passing faults are used up.

        A download that breaks off goes on where it stopped if the server's file is still the same.

        Raises:
            RequestError: `offline` is set.
            RateLimited: the limit is used up and `wait` is not set.
            Unreachable: no whole answer within the tries or the clock's patience.
            BadAnswer: it is longer than `most` bytes; no more of it is read.
        """
        part = _Part(most)
        for attempt in range(1, tries + 1):
            self._hold(url, bucket)
            try:
                asked = {"Accept-Encoding": "gzip" if bucket else "identity", **(headers or {})}
                answer = self._once(method, url, body, asked, clock, part)
            except _Broken as broken:
                problem = str(broken)
            else:
                if answer.status == 429 or (answer.status == 503 and _after(answer) is not None):
                    self._limited(answer, bucket, attempt < tries, clock)
                    continue
                if answer.status not in _PASSING:
                    clock.good()
                    self._pace(answer, bucket)
                    return answer
                if attempt == tries:
                    return answer
                problem = f"status {answer.status}"
            if attempt == tries or (left := clock.left) <= 0:
                break
            self._sleep(min(0.5 * 2 ** (attempt - 1), left))
        tried = "1 try" if attempt == 1 else f"{attempt} tries"
        raise Unreachable(f"{_plain(url)}: {problem} ({tried})")

    def _once(
        self,
        method: str,
        url: str,
        body: object,
        headers: dict[str, str],
        clock: Clock,
        part: "_Part",
    ) -> Answer:
        """One try. If it breaks off, what arrived is in `part`, where the next try goes on."""
        if part.data and part.etag.startswith('"'):  # a weak ETag promises no equal bytes
            headers = headers | {"Range": f"bytes={len(part.data)}-", "If-Range": part.etag}
        try:
            for _ in range(6):  # by hand: requests would take our key along to another host
                limit = max(min(self.timeout, clock.left), 0.05)
                mine = dict(headers)
                if self._key and _origin(url) == self._key_origin:
                    mine[self._header] = self._scheme + self._key
                response = self._session.request(
                    method,
                    url,
                    json=body,
                    headers=mine,
                    timeout=limit,
                    stream=True,
                    allow_redirects=False,
                )
                with response:
                    if response.is_redirect and (to := response.headers.get("Location")):
                        url = urljoin(url, to)
                        if response.status_code not in (307, 308) and method != "GET":
                            method, body = "GET", None
                        continue
                    return self._whole(url, response, clock, part)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise _Broken(_reason(error)) from error
        raise _Broken("too many redirects")

    def _whole(self, url: str, response: requests.Response, clock: Clock, part: "_Part") -> Answer:
        status = response.status_code
        start = part.data if status == 206 else b""
        part.data, part.etag = b"", response.headers.get("ETag", "")
        span = response.headers.get("Content-Range", f"bytes {len(start)}-")
        if status == 416 or not span.startswith(f"bytes {len(start)}-"):
            raise _Broken("it cannot go on where it stopped")
        pieces = [start]
        try:
            self._read(url, response, pieces, clock, part.most)
        finally:
            data = b"".join(pieces)
            part.data = data if status in (200, 206) else b""
        if self._key and status >= 400:  # some servers repeat what they were sent
            data = data.replace(self._key.encode(), b"(key)")
        return Answer(_plain(url), 200 if status == 206 else status, response.headers, data)

    def _read(
        self, url: str, response: requests.Response, pieces: list[bytes], clock: Clock, most: int
    ) -> None:
        """Reads the raw body piece by piece; raises if it stalls, or is longer than it may be.

        That it has the length that was announced is urllib3's check.
        """
        since, whole = 0, len(pieces[0])
        began = time.monotonic()
        # read1 returns what is there: read would wait, however long, for its whole block.
        while piece := response.raw.read1(1 << 16, decode_content=False):
            pieces.append(piece)
            since += len(piece)
            whole += len(piece)
            if whole > most:
                pieces.clear()
                raise BadAnswer(f"{_plain(url)}: the answer is longer than {most:,} bytes")
            if (taken := time.monotonic() - began) > min(self.timeout, max(clock.left, 0.5)):
                if since < taken * _SLOWEST:
                    raise TimeoutError
                if response.status_code < 400:
                    clock.good()
                since, began = 0, time.monotonic()

    # -- rate limits -----------------------------------------------------------------------------

    def _hold(self, url: str, bucket: str) -> None:
        """Refuses, or sleeps, before a request that must not or cannot be answered."""
        if self.offline:
            raise RequestError(f"offline: {_plain(url)} was not asked")
        if self.wait and (early := self._due.pop(bucket, 0.0) - time.monotonic()) > 0:
            self._sleep(early)
        block = self._blocked.get(bucket)
        if block is None:
            return
        left = (block.reset - datetime.now(UTC)).total_seconds()
        if left > 0:
            raise block
        self._blocked.pop(bucket, None)

    def _limited(self, answer: Answer, bucket: str, again: bool, clock: Clock) -> None:
        """A 429, or a 503 that says when to come back: sleep if that is soon or wanted."""
        after = _after(answer)
        limit, window, endpoint = None, 3600.0, urlsplit(answer.url).path
        try:
            data = answer.json()
            limit = int(data["limitPerWindow"])
            endpoint = str(data["endpoint"])[:80]
            window = 60.0 * float(re.split(r"\s*m", str(data["requestWindow"]))[0])
        except (BadAnswer, KeyError, TypeError, ValueError):
            pass
        now = time.time()
        if after is None:
            # The server holds the block until its full UTC hour ends; capacity then comes back
            # one request per window/limit, so be two of those late.
            window = max(window, 1.0)
            after = window - now % window + (2 * window / limit if limit else 0)
        error = RateLimited(endpoint, limit, window, datetime.fromtimestamp(now + after, UTC))
        soon = "Retry-After" in answer.headers and after <= clock.patience
        if not (again and (soon or self.wait)):
            if not self.wait:
                self._blocked[bucket] = error
            raise error
        self._sleep(after)
        clock.good()  # the server told us to wait: that is not a failure

    def _pace(self, answer: Answer, bucket: str) -> None:
        """Where waiting is wanted, slows down before the wall: a tenth of the limit is left."""
        remaining = answer.headers.get("x-limit-remaining", "")
        limit = LIMITS.get(bucket, 25_000)
        if self.wait and remaining.isdigit() and int(remaining) < limit // 10:
            self._due[bucket] = time.monotonic() + 3600 / limit


def _after(answer: Answer) -> float | None:
    """Seconds from the Retry-After header, a number or a date."""
    text = answer.headers.get("Retry-After", "").strip()
    if text.isdigit() and len(text) < 7:
        return float(text)
    try:
        return max((parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname, port


def _plain(url: str) -> str:
    """A URL for an error message, without a name and password."""
    return re.sub(r"//[^/@]*@", "//", url)


def _reason(error: Exception) -> str:
    """What went wrong with a connection, without the library's own long text."""
    text = f"{type(error).__name__} {error}".lower()
    for sign, reason in (
        ("timed out", "it does not answer"),
        ("timeout", "it does not answer"),
        ("refused", "the connection was refused"),
        ("resolve", "no such host"),
        ("ssl", "its certificate was not accepted"),
    ):
        if sign in text:
            return reason
    return "the connection broke off"
