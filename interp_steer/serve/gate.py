"""Who may ask, and how large and slow a request may be: checked before anything is read."""

import asyncio
import hmac
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = re.compile(r"/|/health|/page/[a-z.]+")  # without a token: the page asks for it


@dataclass(frozen=True)
class Limits:
    """What one client may ask for.

    Attributes:
        body: bytes of a request.
        patience: seconds in which a request must have come.
        tokens: of an answer.
        most: rows in the batch.
        waiting: rows that may wait.
    """

    body: int = 2**20
    patience: float = 30.0
    tokens: int = 2048
    most: int = 64
    waiting: int = 256


class Refused(Exception):
    """A request that is answered by a status alone."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


def error_body(message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Gate:
    """The outermost layer of the app.

    Without a token only this machine may ask: the request's `Host` must be a name of it, so that no
    page from elsewhere reaches the server by a name that it has bound to this address.
    """

    def __init__(self, app: App, token: str | None, limits: Limits) -> None:
        self.app, self.token, self.limits = app, token, limits

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._admit(scope)
            body = await self._read(scope, receive)
        except Refused as refused:
            await _answer(send, refused)
            return
        if body is None:
            return  # the client has left
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)

    def _admit(self, scope: Message) -> None:
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        if self.token is None:
            host = _host(headers.get("host", ""))
            if not _is_here(host):
                raise Refused(403, f"this server answers to localhost, not to {host[:80]!r}")
            origin = headers.get("origin")
            if origin and origin != "null" and not _is_here(_host(origin.partition("://")[2])):
                raise Refused(403, "pages from elsewhere may not ask this server")
        elif not OPEN.fullmatch(scope["path"]):
            said = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(said, f"Bearer {self.token}".encode()):
                raise Refused(401, "a wrong token, or none: send 'Authorization: Bearer TOKEN'")
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Refused(415, f"Content-Type is {kind[:60]!r}; expected application/json")
            length = headers.get("content-length", "0")
            if length.isdecimal() and int(length) > self.limits.body:
                raise Refused(413, self._large())

    def _large(self) -> str:
        return f"the body is too large; expected at most {self.limits.body:,} bytes"

    async def _read(self, scope: Message, receive: Receive) -> bytes | None:
        """The whole body, or None of a client that has left."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.patience):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.limits.body:
                        await self._discard(receive)
                        raise Refused(413, self._large())
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Refused(408, f"the body took longer than {self.limits.patience:g} s") from None

    async def _discard(self, receive: Receive) -> None:
        """Reads on for a while: a connection that is closed with bytes unread loses the answer."""
        size = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(self.limits.patience / 2):
                while size < self.limits.body:
                    message = await receive()
                    size += len(message.get("body", b""))
                    if not message.get("more_body"):
                        return


def _host(text: str) -> str:
    """`localhost` of `localhost:8000`, `::1` of `[::1]:8000`."""
    text = text.partition("/")[0]
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _is_here(host: str) -> bool:
    return is_loopback(host.lower())


async def _answer(send: Send, refused: Refused) -> None:
    content = json.dumps(error_body(refused.message, refused.status)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    headers += [(b"connection", b"close")]
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
